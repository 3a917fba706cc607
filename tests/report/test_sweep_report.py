"""A sweep's page in a real browser, and TensorBoard's HPARAMS page of the same sweep."""

from __future__ import annotations

import json
import math
from pathlib import Path

import optuna
import pytest
import yaml

from gan_dist.config.schema import load_config
from gan_dist.report.sweep import make_sweep_report
from gan_dist.runs.study import BEST, JOURNAL, RECORD, STUDY, importances, open_journal, read_sweep, trial_path
from gan_dist.telemetry.hparams import begin_session, end_session, write_experiment
from gan_dist.telemetry.telemetry import Telemetry
from gan_dist.utils.errors import GanDistError, UserError
from tests.helpers.browser import browser
from tests.telemetry.test_curves_in_tensorboard import get, tensorboard

SPACE = {
    "optim.d_lr": {"float": [0.0, 1.0]},
    "optim.g_lr": {"log": [1e-5, 1e-1]},
    "optim.betas": {"choice": [[0.0, 0.9], [0.5, 0.999]]},
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of ten trials, whose value is all optim.g_lr's doing; two were pruned, one failed, one runs."""
    folder = tmp_path_factory.mktemp("runs") / "a <b>&'sweep"
    folder.mkdir()
    config = load_config({"data": {"shards": "/set"}, "evaluate": {"every_steps": 1}}).to_dict()
    (folder / RECORD).write_text(yaml.safe_dump({"space": SPACE, "config": config}))
    (folder / BEST).write_text("# trial-0003\noptim:\n  g_lr: 0.001\n")
    study = optuna.create_study(
        study_name=STUDY, storage=open_journal(folder), sampler=optuna.samplers.RandomSampler(seed=4)
    )
    study.set_user_attr("trials", 12)
    domains = {"optim.d_lr": (0.0, 1.0), "optim.g_lr": (1e-5, 1e-1), "optim.betas": [[0.0, 0.9], [0.5, 0.999]]}
    write_experiment(folder, domains)
    for number in range(10):
        trial, run = study.ask(), trial_path(folder, number)
        rate = trial.suggest_float("optim.g_lr", 1e-5, 1e-1, log=True)
        other = trial.suggest_float("optim.d_lr", 0.0, 1.0)
        betas = trial.suggest_categorical("optim.betas", ["[0.0, 0.9]", "[0.5, 0.999]"])
        run.mkdir()
        begin_session(run, {"optim.g_lr": rate, "optim.d_lr": other, "optim.betas": betas})
        begin_session(run, {"optim.g_lr": 77.0})  # once is enough
        telemetry = Telemetry(run, active=True, step=0, total_steps=1, console=False)
        telemetry.scalars(1, 8, {"evaluate/swd": rate, "evaluate/fid": 100 * rate, "progress/epoch": 12.0})
        telemetry.close()
        trial.report(rate, 1)
        if number < 9:
            state = {4: "PRUNED", 5: "PRUNED", 6: "FAIL"}.get(number, "COMPLETE")
            trial.set_user_attr("reason", {"PRUNED": "pruned after evaluation 1", "FAIL": "no <disk>"}.get(state, ""))
            study.tell(trial, rate if state == "COMPLETE" else None, state=optuna.trial.TrialState[state])
            end_session(run, state != "FAIL")
    return folder


def test_the_page_lays_the_trials_side_by_side(sweep: Path, tmp_path: Path) -> None:
    read = read_sweep(sweep)
    page_file = make_sweep_report(sweep, tmp_path / "sweep.html")
    assert make_sweep_report(sweep) == sweep / "report.html"
    with browser() as page:
        for width, mobile in ((1200, False), (390, True)):
            page.open(page_file.as_uri(), width=width, mobile=mobile)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        page.screenshot(tmp_path / "sweep.png", whole=True)
        assert page.evaluate("document.querySelector('h1').textContent") == sweep.name
        names = page.evaluate("[...document.querySelectorAll('.figures tbody th')].map(e => e.textContent)")
        assert names == [trial.name for trial in read.ranked()] and len(names) == 10
        first = [page.evaluate(f"document.querySelectorAll('.figures td')[{n}].textContent") for n in (0, 1)]
        assert read.best and first == ["complete", f"{read.best.value:.4g}"]
        titles = page.evaluate("[...document.querySelectorAll('.chart figcaption b')].map(e => e.textContent)")
        assert titles[:2] == ["The search", "optim.g_lr"] and set(titles[2:]) == {"optim.d_lr", "optim.betas"}
        dots = page.evaluate("""[...document.querySelectorAll('.chart')].slice(1).map(chart =>
            [...chart.querySelectorAll('.dot')].map(dot => dot.getBoundingClientRect().x))""")
        assert [len(each) for each in dots] == [8, 8, 8] and len(
            {round(x) for x in dots[titles.index("optim.betas") - 1]}
        ) == 2
        shares = page.evaluate("[...document.querySelectorAll('.shares th')].map(e => e.textContent)")
        assert shares[0] == "optim.g_lr" and len(shares) == 3
        assert "no <disk>" in page.evaluate("document.body.textContent") and page.complaints == []
        assert yaml.safe_load(page.evaluate("document.getElementById('yaml').textContent"))["optim"]["g_lr"] == 0.001
    assert next(iter(importances(sweep))) == "optim.g_lr" and importances(sweep)["optim.g_lr"] > 0.5


def test_a_sweep_without_a_complete_trial_and_what_is_no_sweep(sweep: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    (new / RECORD).write_bytes((sweep / RECORD).read_bytes())
    with pytest.raises(UserError, match=r"holds no sweep \(no study.journal\)"):
        make_sweep_report(new)
    optuna.create_study(study_name=STUDY, storage=open_journal(new))
    text = make_sweep_report(new).read_text()
    assert "No trial is complete yet" in text and "No trial has begun yet" in text and "0 of 0 trials" in text
    (new / JOURNAL).write_text("{broken\n{}\n")
    with pytest.raises(GanDistError, match=r"cannot read .*study.journal"):
        read_sweep(new)


def test_tensorboards_hparams_page_shows_a_session_for_each_trial(sweep: Path, tmp_path: Path) -> None:
    with tensorboard(sweep, False, folder=".", run="trial-0009/tensorboard", last=1) as address, browser() as page:
        experiment = get(f"{address}/data/plugin/hparams/experiment?request=%7B%7D")
        assert {info["name"] for info in experiment["hparamInfos"]} == set(SPACE)
        assert [info["name"]["tag"] for info in experiment["metricInfos"]] == ["evaluate/swd", "evaluate/fid"]
        page.open(f"{address}/#hparams", width=1600, height=1000)
        text = """(() => { let all = ''; const walk = (root) => { all += root.textContent; for (const e of
            root.querySelectorAll('*')) if (e.shadowRoot) walk(e.shadowRoot); }; walk(document); return all; })()"""
        page.wait_for(f"{text}.includes('trial-0009') && {text}.includes('trial-0003')", 60)
        page.screenshot(tmp_path / "hparams.png")
        shown = page.evaluate(text)
        assert "tensorboard.evaluate" not in shown, "metrics have their tags' names"
        assert all(f"trial-{number:04d}" in shown for number in range(10)) and "evaluate/fid" in shown
        assert json.dumps([0.5, 0.999]) in shown
        value = read_sweep(sweep).trials[3].values[1]
        assert f"{value:.{4 - math.floor(math.log10(value))}f}" in shown, value  # five digits, as the page shows them

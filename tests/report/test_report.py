"""report.html in a real browser, at phone and desktop width, for whole, broken, empty and missing runs."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gan_dist.data.dataset import open_dataset
from gan_dist.report import films
from gan_dist.report.charts import Chart, Series, bucketed, log_ticks, plot, short, smoothed, ticks
from gan_dist.report.curves import curves
from gan_dist.report.films import film
from gan_dist.report.history import closing_lines
from gan_dist.report.report import make_report, templates
from gan_dist.runs.record import by_protocol, merged, read_run
from gan_dist.telemetry.console import status_line
from gan_dist.utils.errors import UserError
from gan_dist.utils.pictures import save_png
from tests.helpers.browser import browser
from tests.helpers.runs import Game

PRESETS: dict[str, dict[str, Any]] = {
    "near": {"seed": 1, "model": {"resolution": 32, "latent_dim": 8, "g_channels": 4, "d_channels": 4}},
    "far": {"seed": 9, "model": {"resolution": 256}},
}


MOVE = """(() => { const s = document.querySelector('.reel input');
    s.value = VALUE; s.dispatchEvent(new Event('input')); })()"""


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed, stopped and ended, with a name that would break out of careless HTML."""
    game = Game(tmp_path_factory.mktemp("runs") / "a <b>&'run\"", open_dataset(dataset))
    game.play(0, 5)
    game.play(3, 8, last_word="stop")
    game.play(8, 12, last_word="end")
    (game.run_dir / "checkpoints" / "step-00000012").mkdir(parents=True)
    (game.run_dir / "checkpoints" / "step-00000012" / "manifest.json").write_text("{}")
    return game.run_dir


@pytest.mark.parametrize(("width", "mobile", "dark"), [(1200, False, False), (390, True, True)])
def test_the_page_in_a_browser(run: Path, tmp_path: Path, width: int, mobile: bool, dark: bool) -> None:
    page_file = make_report(run, tmp_path / "report.html", PRESETS)
    with browser() as page:
        page.open(page_file.as_uri(), width=width, mobile=mobile, dark=dark)
        images = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.clientWidth])")
        assert len(images) == 3 and all(natural > 50 and shown > 200 for natural, shown in images)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        assert page.evaluate("document.querySelector('h1').textContent") == "a <b>&'run\""
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        red = int(re.findall(r"\d+", background)[0])
        assert (red < 64) == dark

        film_box = "document.querySelector('[data-film] img')"
        shots, labels = [], []
        for value in (0, 2, 99):
            page.evaluate(MOVE.replace("VALUE", str(value)))
            page.wait_for(f"{film_box}.complete")
            page.evaluate(f"{film_box}.scrollIntoView({{block: 'center'}})")
            page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            shots.append(page.screenshot())
            labels.append(page.evaluate("document.querySelector('.reel output').textContent"))
        assert labels == ["step 0", "step 6", "step 12"]
        assert len(set(shots)) == 3, "the slider does not move the picture"

        page.evaluate("document.querySelector('.reel button').click()")
        page.wait_for("document.querySelector('.reel button').textContent === 'Play'")

        page.evaluate("""(() => { const plot = document.querySelector('.plot'); plot.scrollIntoView();
            const box = plot.getBoundingClientRect(), clientX = box.left + box.width * .5;
            plot.dispatchEvent(new PointerEvent('pointermove', {clientX, bubbles: true})); })()""")
        tip = page.evaluate("document.querySelector('.tip').innerText")
        assert tip.startswith("step 6") and "discriminator" in tip and "generator" in tip
        assert page.complaints == []
        assert [url for url in page.requests if not url.startswith(("data:", page_file.as_uri()))] == []


def test_the_page_shows_what_the_run_holds(run: Path, dataset: Path) -> None:
    text = make_report(run, presets=PRESETS).read_text()
    assert (run / "report.html").stat().st_size < 10e6
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?:https?:)?//""", text)
    for words in (
        "Losses",
        "D(G(z))",
        "equilibrium, -log 4",
        "Gradient norms",
        "Images a second",
        "Update-to-weight ratio",
    ):
        assert words in text
    assert "Unlike the preset nearest to it, <b>near</b>" in text and "<th>seed</th><td>0</td><td>1</td>" in text
    assert "Ended without notice" in text and "Stopped at step 8" in text and "Finished at step 12" in text
    reasons = json.loads((run / "dataset.json").read_text())["rejected"]
    assert reasons and all(f"<th>{reason}</th><td>{count}</td>" in text for reason, count in reasons.items())
    assert "gan-dist sample" in text and "tensorboard --logdir" in text
    assert "<b>&" not in text.replace("&lt;b&gt;", "")


def test_runs_side_by_side(run: Path, dataset: Path, tmp_path: Path) -> None:
    other = Game(tmp_path / "other", open_dataset(dataset), total=6)
    other.config["seed"] = 5
    (other.run_dir / "config.yaml").write_text(json.dumps(other.config))
    other.play(0, 6, last_word="end")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text("seed: 7\n")
    out = make_report([run, other.run_dir, bare], tmp_path / "three.html")
    text = out.read_text()
    assert "<th>seed</th><td>0</td><td>5</td><td>7</td>" in text
    assert "bare has drawn no grid yet." in text
    with browser() as page:
        page.open(out.as_uri(), width=390, mobile=True)
        assert page.evaluate("document.images.length") == 2
        page.evaluate(MOVE.replace("VALUE", "0"))
        assert page.evaluate("[...document.querySelectorAll('[data-step]')].map(e => e.textContent)") == ["step 0"] * 2
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.complaints == []


def test_seeds_of_one_configuration_give_mean_and_spread(tmp_path: Path) -> None:
    def logged(name: str, seed: int, rate: float, swd: list[float | None]) -> Path:
        (tmp_path / name).mkdir()
        config = {"seed": seed, "optim": {"g_lr": rate}, "data": {"shards": name}}
        (tmp_path / name / "config.yaml").write_text(json.dumps(config))
        lines = [{"step": 10 * number, "images_seen": 1, "evaluate/swd": value} for number, value in enumerate(swd, 1)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    runs = [logged("a", 0, 0.1, [9, 2]), logged("b", 1, 0.1, [9, 4]), logged("c", 2, 0.1, [9, 9])]
    page = make_report([*runs, logged("other", 3, 0.2, [1, 1])], tmp_path / "seeds.html").read_text()
    assert "Over 3 seeds" in page and "a, b, c, at step 20." in page and page.count("<h2>Over") == 1
    assert "<th>evaluate/swd</th><td>5</td><td>3.606</td><td>2</td><td>9</td><td>3</td>" in page
    for run, fid in zip(runs, (30.0, 32.0, 34.0), strict=True):  # what `gan-dist evaluate` measured afterwards
        row = {"step": 20, "images_seen": 1, "swd": 1.0, "fid": fid, "protocol": {"samples": 5}}
        (run / "evaluations.jsonl").write_text(json.dumps(row) + "\n")
    after = make_report(runs, tmp_path / "after.html").read_text()
    assert "<th>evaluate/fid</th><td>32</td><td>2</td><td>30</td><td>34</td><td>3</td>" in after
    with (runs[0] / "evaluations.jsonl").open("a") as file:  # against other images: nothing to compare it with
        file.write(json.dumps({"step": 30, "swd": 7.0, "fid": 90.0, "protocol": {"samples": 6}}) + "\n")
    assert "<th>evaluate/fid</th><td>32</td>" in make_report(runs, tmp_path / "after.html").read_text()
    far = make_report([*runs[:2], logged("d", 5, 0.1, [9, 4, 6])], tmp_path / "far.html").read_text()
    assert "steps 20 to 30: not all are equally far" in far
    assert "<h2>Over" not in make_report([runs[0], tmp_path / "other"], tmp_path / "two.html").read_text()


def test_runs_with_little_or_nothing_in_them(run: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no run"):
        make_report(empty)
    (empty / "config.yaml").write_text("seed: 0\n")
    text = make_report(empty).read_text()
    assert "not begun" in text and "No grid was drawn yet" in text and "Nothing is logged yet" in text
    assert "Nothing is recorded yet" in text and "kept no card" in text
    blind = tmp_path / "blind"
    shutil.copytree(run, blind, ignore=shutil.ignore_patterns("samples", "dataset.json", "tensorboard"))
    text = make_report(blind).read_text()
    assert "No grid was drawn yet" in text and "Losses" in text
    torn = tmp_path / "torn"
    shutil.copytree(run, torn)
    (torn / "samples" / "step-00000012.png").write_bytes(b"\x89PNG torn")
    (torn / "environment.json").write_text("{")
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss/dis')
    assert "step 9" in make_report(torn).read_text()
    with pytest.raises(UserError, match="no run at"):
        make_report(tmp_path / "missing")


def test_states_and_their_line(run: Path, dataset: Path, tmp_path: Path) -> None:
    assert status_line(run).startswith("a <b>&'run\" done step=12/12 epoch=")
    game = Game(tmp_path / "live", open_dataset(dataset))
    game.play(0, 4)
    assert read_run(game.run_dir).state == "running" and read_run(game.run_dir).total == 12
    assert " running step=4/12 " in status_line(game.run_dir) and status_line(game.run_dir).endswith(" left=0s")
    for name in ("metrics.jsonl", "environment.json"):
        os.utime(game.run_dir / name, (time.time() - 9999,) * 2)
    assert read_run(game.run_dir).state == "interrupted"
    assert "No news since" in make_report(game.run_dir).read_text()
    game.play(4, 5, last_word="stop")
    assert status_line(game.run_dir).endswith("(SIGTERM)") and " stopped " in status_line(game.run_dir)


def measured(step: int, *, inception: str | None = None, samples: int = 100, **figures: Any) -> dict[str, Any]:
    protocol = {"samples": samples, "averaged": True, "inception": inception}
    return {"step": step, "swd": float(step), **figures, "protocol": protocol}


def test_figures_of_other_weights_or_held_out_sets_are_not_laid_side_by_side() -> None:
    plain, first, second = measured(4), measured(4, inception="a", fid=10.0), measured(4, inception="b", fid=20.0)
    for rows in itertools.permutations([plain, first, second]):
        found = merged([measured(2), *rows])
        assert sorted((row["protocol"]["inception"], row["fid"]) for row in found[1:]) == [("a", 10.0), ("b", 20.0)]
        assert found[0] == measured(2) and [row["step"] for row in found] == [2, 4, 4]
        groups = by_protocol([*found, measured(6, inception="a", fid=5.0)])
        assert [[row.get("fid") for row in group] for group in groups] == [[None, 10.0, 5.0], [20.0]]
    one, other = measured(4, held_out="x", accuracy_held_out=0.5), measured(4, held_out="y", accuracy_held_out=0.9)
    for rows in itertools.permutations([plain, one, other]):
        assert sorted((row["held_out"], row["accuracy_held_out"]) for row in merged(rows)) == [("x", 0.5), ("y", 0.9)]
    assert merged([plain, first, one]) == [{**first, **one, "protocol": first["protocol"]}]
    assert len(merged([plain, measured(4, samples=200)])) == 2
    assert merged([{**first, "fid": 11.0}, first]) == [first]  # measured again


EVERYTHING: dict[str, Any] = {
    "images_seen": 10**6,
    "swd": 124.1234,
    "swd_64": 223.4567,
    "swd_32": 145.6789,
    "swd_16": 112.3456,
    "epoch": 12.34,
    "diversity": 0.56789,
    "near_copies": 0.015625,
    "repeated": 0.0123456,
    "fid": 124.7071,
    "kid": 0.0976543,
    "kid_std": 0.00456789,
    "precision": 0.66789,
    "recall": 0.23456,
    "accuracy_training": 0.98765,
    "accuracy_held_out": 0.87654,
    "held_out": "ab" * 32,
}


def test_all_that_evaluations_find_is_in_sight(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    rows = [measured(step, inception="cd" * 32, **{**EVERYTHING, "swd": 9.0 * step}) for step in (3, 6, 12)]
    rows.append(measured(12, inception="ef" * 32, fid=77.77))
    (tmp_path / "run" / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page_file = make_report(tmp_path / "run")
    assert page_file.read_text().count("<td>77.77</td>") == 1 and "swd_64" not in page_file.read_text()
    with browser() as page:
        for width, mobile in ((1200, False), (390, True)):
            page.open(page_file.as_uri(), width=width, mobile=mobile)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
            boxes = page.evaluate("""[...document.querySelectorAll('.figures .scroll')].map(box =>
                [box.scrollWidth, box.clientWidth, getComputedStyle(box).overflowX])""")
            assert len(boxes) == 2 and all(how == "auto" for _, _, how in boxes)
            assert mobile or max(inner / outer for inner, outer, _ in boxes) < 1.1, "too wide for a desk"
            heights = page.evaluate("[...document.querySelectorAll('.figures td')].map(cell => cell.clientHeight)")
            assert len(heights) > 45 and max(heights) < 40, "a number is broken in two"
        titles = page.evaluate("[...document.querySelectorAll('.chart figcaption b')].map(title => title.textContent)")
        assert {"FID", "KID", "Precision and recall", "Diversity of samples", "Near copies"} <= set(titles)
        assert "Epoch" not in titles and len(titles) == len(set(titles)) and page.complaints == []


def test_levels_of_one_distance_share_a_chart(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    levels: dict[str, Any] = {f"{name}_{side}": 1.0 for name in ("swd", "swd_progan") for side in (16, 128, 64)}
    row = measured(4, swd_progan=1.0, swd_floor=0.5, **levels)
    (tmp_path / "run" / "evaluations.jsonl").write_text(json.dumps(row) + "\n")
    drawn = {chart.title: [series.name for series in chart.series] for chart in curves(read_run(tmp_path / "run"))}
    assert drawn["Distance from real images"] == ["swd", "swd 128", "swd 64", "swd 16", "swd floor"]
    published = ["swd progan", "swd progan 128", "swd progan 64", "swd progan 16"]
    assert drawn["Distance in ProGAN's published form"] == published
    assert not [title for title in drawn if title.startswith("Swd")]


def test_the_last_lines_of_a_command(run: Path, dataset: Path, tmp_path: Path) -> None:
    lines = closing_lines(read_run(run))
    assert lines[0].startswith("done: step 12 of 12, 48 images seen, 100.0 images/s")
    assert any("newest samples" in line and "step-00000012.png" in line for line in lines)
    assert any("gan-dist sample" in line for line in lines) and not any("continue it" in line for line in lines)
    game = Game(tmp_path / "stopped", open_dataset(dataset))
    game.play(0, 2, last_word="stop")
    stopped = closing_lines(read_run(game.run_dir))
    assert stopped[0].startswith("stopped by SIGTERM: step 2 of 12")
    assert any("continue it" in line and "gan-dist train x" in line for line in stopped)


def test_a_page_stays_small_whatever_the_run(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (3, 400, 400), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    samples = []
    for step in range(60):
        path = tmp_path / f"step-{step:08d}.png"
        save_png(noise.roll(step, 1), path)
        samples.append((step, path))
    frames = film(samples, 1_500_000)
    assert 6 <= len(frames) <= 48 and sum(len(frame.src) for frame in frames) <= 1_500_000
    assert (frames[0].step, frames[-1].step) == (0, 59)
    tiny = film(samples, 20_000)
    assert sum(len(frame.src) for frame in tiny) <= 20_000
    assert len(films.still(samples[0][1], 150_000) or "") in range(1, 150_000)


def test_axes_have_round_numbers() -> None:
    assert ticks(0, 1) == [0, 0.5, 1] and ticks(-1.5, 0.2)[-1] == 0
    assert ticks(3, 3) == [3]
    assert [round(10**tick, 6) for tick in log_ticks(0.5, 1.2)] == [5, 10]
    assert log_ticks(-3, 3) == [-3.0, -1.0, 1.0, 3.0]
    assert [short(v) for v in (0, 0.25, 1234, 12000, 3.5e6, 2e-5)] == ["0", "0.25", "1234", "12k", "3.5M", "2e-05"]


def render(chart: Chart) -> str:
    return templates.from_string("{% from 'parts.html' import chart %}{{ chart(plot) }}").render(plot=plot(chart))


def test_curves_survive_gaps_and_length() -> None:
    points = [(float(i), float(i % 7)) for i in range(5000)]
    fewer = bucketed(points, 300)
    assert len(fewer) <= 300 and fewer[-1] == points[-1]
    assert [y for _, y in smoothed([(0.0, 4.0), (1.0, 4.0)], 0.9)] == pytest.approx([4, 4])
    drawn = render(
        Chart("t", [Series("a", [(1, None), (2, float("nan")), (3, 2.0)]), Series("b", [(1, float("inf"))])])
    )
    assert "nan" not in drawn and "inf" not in drawn and drawn.count('class="curve') == 1
    assert "Nothing logged yet" in render(Chart("t", [Series("a", [])]))
    assert "Nothing logged yet" in render(Chart("t", [Series("a", [(1, -1.0)])], log=True))

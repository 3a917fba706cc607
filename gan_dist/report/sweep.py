"""A sweep -> one self-contained page: the best configuration, what it depends on, and every trial, best first."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from gan_dist.config.diff import flatten
from gan_dist.report.charts import Chart, Scatter, Series, plot, scatter
from gan_dist.report.report import templates, write_page
from gan_dist.runs.metrics_file import read_metrics
from gan_dist.runs.study import BEST, OBJECTIVE, Sweep, Trial, importances, read_sweep
from gan_dist.utils.files import expand

FIGURES = ("evaluate/fid", "throughput/images_per_second")
"""Tags whose newest values the table of trials shows, where any of them has logged them."""


def make_sweep_report(path: str | Path, out: str | Path | None = None) -> Path:
    """Returns the page written, SWEEP/report.html or `out`. Raises UserError where there is no sweep."""
    sweep = read_sweep(expand(path))
    page = templates.get_template("sweep.html").render(_values(sweep))
    return write_page(expand(out or sweep.path / "report.html"), page)


def _values(sweep: Sweep) -> dict[str, Any]:
    """Returns the values of sweep.html."""
    count = {state: sum(trial.state == state for trial in sweep.trials) for state in ("complete", "pruned", "failed")}
    shares = importances(sweep.path)
    keys = sorted(sweep.space, key=lambda key: -shares.get(key, 0.0))
    file = sweep.path / BEST
    return {
        "title": sweep.path.name,
        "objective": OBJECTIVE,
        "account": sweep.account(),
        "best": sweep.best,
        "tiles": [
            (f"{sum(count.values())}", f"of {max(sweep.total, len(sweep.trials))} trials"),
            *((str(number), state) for state, number in count.items()),
            (f"{sweep.best.value:.4g}" if sweep.best and sweep.best.value is not None else "none yet", "best"),
        ],
        "differences": _differences(sweep),
        "yaml": file.read_text(encoding="utf-8") if file.is_file() else "",
        "command": f"gan-dist train {shlex.quote(str(file))} --name NAME",
        "importance": [(key, share, f"{share:.0%}") for key, share in shares.items()],
        "progress": plot(_progress(sweep)),
        "scatters": [scatter(_scatter(sweep, key)) for key in keys],
        **_table(sweep, keys),
    }


def _differences(sweep: Sweep) -> list[tuple[str, tuple[Any, Any]]]:
    """Returns (key, (the best trial's value, the one that the sweep started from)) of the keys that were searched."""
    start = flatten(sweep.config)
    return [(key, (value, start.get(key))) for key, value in (sweep.best.settings if sweep.best else {}).items()]


def _progress(sweep: Sweep) -> Chart:
    """Returns the chart of what each complete trial came to, and of the best so far."""
    values = [(float(trial.number), trial.value) for trial in sweep.trials if trial.state == "complete"]
    lowest, best = math.inf, list[tuple[float, float | None]]()
    for number, value in values:
        lowest = min(lowest, value if value is not None else math.inf)
        best.append((number, lowest))
    positive = all(value is not None and value > 0 for _, value in values)
    series = [Series("best so far", best), Series("trial", values)]
    return Chart(
        "The search", series, "Complete trials in the order in which they began.", log=positive, x_name="trial"
    )


def _scatter(sweep: Sweep, key: str) -> Scatter:
    """Returns the chart of OBJECTIVE over one key."""
    ((kind, values),) = sweep.space[key].items()
    dots: dict[str, list[tuple[Any, float, str]]] = {"complete": [], "pruned": []}
    for trial in sweep.trials:
        if trial.state in dots and trial.value is not None and key in trial.settings:
            dots[trial.state].append((trial.settings[key], trial.value, f"{trial.name}: {trial.value:.4g}"))
    return Scatter(key, dots, log_x=kind == "log", choices=values if kind == "choice" else None)


def _table(sweep: Sweep, keys: list[str]) -> dict[str, Any]:
    """Returns the table of all trials, best first."""
    figures = {trial.number: _newest(trial) for trial in sweep.trials}
    shown = [tag for tag in FIGURES if any(tag in found for found in figures.values())]
    chip = Markup('<span class="chip {0}">{0}</span>')
    rows = []
    for trial in sweep.ranked():
        value = "" if trial.value is None else f"{trial.value:.4g}"
        found = [f"{figures[trial.number][tag]:.4g}" if tag in figures[trial.number] else "" for tag in shown]
        settings = [_setting(trial, key) for key in keys]
        rows.append((trial.name, [chip.format(trial.state), value, *found, *settings, trial.reason]))
    heads = ["trial", "", OBJECTIVE, *shown, *keys, ""]
    return {"heads": heads, "rows": rows}


def _setting(trial: Trial, key: str) -> Any:
    value = trial.settings.get(key, "")
    return f"{value:.3g}" if isinstance(value, float) else value


def _newest(trial: Trial) -> Mapping[str, float]:
    """Returns the newest value of each of FIGURES that a trial has logged."""
    found: dict[str, float] = {}
    for line in read_metrics(trial.path / "metrics.jsonl"):
        found |= {tag: line[tag] for tag in FIGURES if line.get(tag) is not None}
    return found

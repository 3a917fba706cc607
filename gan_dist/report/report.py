"""A run -> one self-contained HTML page; several runs -> one page that lays them side by side.

The page carries its pictures, curves and few lines of script with it; its content policy forbids every request. What
the templates show is gathered here, as plain values; the templates escape them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from gan_dist.config.diff import changes, flatten
from gan_dist.data.prepare.account import REASONS
from gan_dist.data.shards import read_manifest
from gan_dist.report.charts import plot
from gan_dist.report.curves import COSTS, compared, curves, median, seconds_trained
from gan_dist.report.films import film, still
from gan_dist.report.history import commands, entries
from gan_dist.runs.metrics_file import format_time
from gan_dist.runs.record import Run, by_protocol, comparable, read_run
from gan_dist.telemetry.console import duration
from gan_dist.telemetry.gallery import dataset_card
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import expand, write_atomically
from gan_dist.utils.system import own_files

FILM_BUDGET = 5_500_000
"""Bytes that the films take on a page, over all its runs; a page stays below 10 MB."""
STILLS_BUDGET = 2_500_000
LAST = ("loss/discriminator", "loss/generator", "probability/real", "probability/fake", "evaluate/swd")
"""Tags whose newest values the table of several runs shows, where any of them has logged them."""
HERE = own_files() / "report"


def make_report(
    runs: Sequence[str | Path] | str | Path,
    out: str | Path | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Returns the page written: RUN/report.html, or for several runs `out` (default report.html here).

    presets: configurations by name, as plain nested values; a run is compared with the one it is most like. A run in
    progress, a crashed or an empty one is shown as far as it got. Raises UserError where there is no such run.
    """
    paths = [runs] if isinstance(runs, str | Path) else list(runs)
    if not paths:
        raise UserError("expected a run, or several")
    read = [_with_dataset(read_run(path)) for path in paths]
    if len(read) == 1:
        target = expand(out or read[0].path / "report.html")
        page = templates.get_template("run.html").render(_one(read[0], presets or {}))
    else:
        target = expand(out or "report.html")
        page = templates.get_template("runs.html").render(_several(read))
    return write_page(target, page)


def write_page(target: Path, page: str) -> Path:
    """Returns `target` once the page stands there. Raises UserError where it cannot be written."""
    try:
        write_atomically(target, page.encode(), make_folder=True)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    return target


def _with_dataset(run: Run) -> Run:
    """Returns the run with its dataset's card, from the dataset itself where the run has none of its own."""
    shards = (run.config.get("data") or {}).get("shards")
    if not run.dataset and isinstance(shards, str):
        try:
            root = expand(shards)
            run.dataset.update(dataset_card(root, read_manifest(root)))
        except (UserError, OSError, ValueError, KeyError):
            pass  # it is not here, or no longer what it was; the page says that there is no card
    return run


def _one(run: Run, presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the values of run.html."""
    step, grid = run.samples[-1] if run.samples else (0, None)
    pictures = ((grid, "Samples", f"step {step:,}"), (run.real, "Real images", "of the dataset"))
    return {
        "title": run.name,
        "run": run,
        "state": {"running": "in progress", "empty": "not begun"}.get(run.state, run.state),
        "last_sign": f"last written {format_time(run.touched)}" if run.touched else "nothing written yet",
        "tiles": _tiles(run),
        "pictures": [(path and still(path, STILLS_BUDGET // 2), title, detail) for path, title, detail in pictures],
        "classes": run.classes and (run.classes[0], still(run.classes[1], STILLS_BUDGET // 2)),
        "film": film(run.samples, FILM_BUDGET),
        "charts": [plot(chart) for chart in curves(run)],
        "evaluations": [_evaluation(rows) for rows in by_protocol(run.evaluations)],
        **_dataset(run.dataset),
        **_configuration(run, presets),
        "entries": entries(run),
        "commands": commands(run),
    }


def _tiles(run: Run) -> list[tuple[str, str]]:
    """Returns the (figure, unit) pairs below the title."""
    newest = run.points[-1] if run.points else {}
    rate, seconds = median(run, "throughput/images_per_second"), seconds_trained(run)
    return [
        (f"{run.step:,}", f"of {run.total:,} steps" if run.total > run.step else "steps"),
        (f"{newest.get('images_seen') or 0:,}", "images seen"),
        (f"{newest.get('progress/epoch') or 0:.2f}", "epochs"),
        (f"{rate:,.0f}" if rate else "unknown", "images/s (median)"),
        (duration(seconds) if seconds else "none yet", "of training"),
        (f"{run.dataset['samples']:,}" if run.dataset.get("samples") else "unknown", "images in the dataset"),
    ]


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the table of evaluations that may be compared, their protocol and the step of the lowest swd."""
    keys = list(
        dict.fromkeys(key for row in rows for key in row if key not in ("step", "protocol", "images_seen", "classes"))
    )
    of_classes = next(((row["step"], row["classes"]) for row in reversed(rows) if row.get("classes")), None)
    protocols = [row["protocol"] for row in reversed(rows) if row.get("protocol")]
    return {
        "heads": ["step", *(key.replace("_", " ") for key in keys)],
        "rows": [(f"{row['step']:,}", [_figure(row.get(key)) for key in keys]) for row in rows],
        "protocol": max(protocols, key=lambda one: one.get("inception") is not None, default=None),
        "best": min(rows, key=lambda row: float(row["swd"]))["step"],
        "classes": of_classes and _by_class(*of_classes),
    }


def _by_class(step: int, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the table of the figures of single classes at `step`."""
    keys = list(dict.fromkeys(key for one in found.values() for key in one))
    rows = [(name, [_figure(one.get(key)) for key in keys]) for name, one in found.items()]
    return {"step": step, "heads": ["class", *keys], "rows": rows}


def _figure(value: Any) -> str:
    """Returns a cell: three digits of a share, four of a distance, the beginning of a hash."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"
    return "" if value is None else str(value)[:8]


def _dataset(card: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the card of the dataset and its account: what became of each source file."""
    rejected, skipped = (_counts(card.get(key)) for key in ("rejected", "skipped"))
    account = {
        "written": int(card.get("written") or card.get("samples") or 0),
        "rejected": sum(rejected.values()),
        "replaced": int(card.get("replaced") or 0),
        "skipped": sum(skipped.values()),
    }
    reasons = sorted(rejected.items(), key=lambda item: -item[1])
    return {
        "dataset": {key: value for key, value in card.items() if key not in ("rejected", "written")},
        "account": [(f"b{number}", name, count) for number, (name, count) in enumerate(account.items())],
        "seen": int(card.get("seen") or sum(account.values())),
        "rejected": [(reason, [f"{count:,}", REASONS.get(reason, "")]) for reason, count in reasons],
    }


def _counts(value: Any) -> dict[str, int]:
    """Returns counts by reason; a bare number has none."""
    if isinstance(value, Mapping):
        return {str(key): int(count) for key, count in value.items()}
    return {"not recorded": int(value)} if value else {}


def _configuration(run: Run, presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the configuration, the preset nearest to it, and the rows of what differs but where the data lie."""
    differences = {
        name: [(key, (new, old)) for key, (old, new) in changes(preset, run.config).items() if key not in LOCAL]
        for name, preset in presets.items()
    }
    nearest = min(differences, key=lambda name: len(differences[name]), default=None)
    return {
        "config": flatten(run.config),
        "preset": nearest,
        "differences": differences[nearest] if nearest is not None else [],
    }


LOCAL = ("data.shards", "data.cache_dir")
"""Keys that say where something lies on this machine."""


def _several(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the values of runs.html."""
    heads = [
        Markup('<span class="legend key"><i class="s{}"></i></span>{}').format(number % 6, run.name)
        for number, run in enumerate(runs)
    ]
    chip = Markup('<span class="chip {0}">{0}</span>')
    newest = [run.points[-1] if run.points else {} for run in runs]
    figures: list[tuple[str, list[Any]]] = [
        ("state", [chip.format(run.state) for run in runs]),
        ("step", [f"{run.step:,} of {run.total:,}" for run in runs]),
        ("images seen", [f"{point.get('images_seen', 0):,}" for point in newest]),
        ("images a second", [f"{median(run, 'throughput/images_per_second') or 0:,.0f}" for run in runs]),
        ("time trained", [duration(seconds_trained(run)) for run in runs]),
        ("dataset", [str(run.dataset.get("manifest", "unknown"))[:12] for run in runs]),
    ]
    logged = [tag for tag in LAST if any(point.get(tag) is not None for point in newest)]
    figures += [(f"{tag}, last", [point.get(tag) for point in newest]) for tag in logged]
    configs = [flatten(run.config) for run in runs]
    keys = sorted({key for config in configs for key in config})
    settings = [(key, [config.get(key) for config in configs]) for key in keys]
    films = [film(run.samples, FILM_BUDGET // len(runs)) for run in runs]
    return {
        "title": " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
        "runs": runs,
        "heads": ["", *heads],
        "figures": figures,
        "over_seeds": _over_seeds(runs),
        "films": list(zip(runs, films, heads, strict=True)),
        "longest": max(map(len, films)),
        "keys": len(keys),
        "settings": [(key, values) for key, values in settings if len(set(map(json.dumps, values))) > 1],
        "charts": [plot(chart) for chart in compared(runs)],
        "histories": [(run.name, entries(run)) for run in runs],
    }


def _over_seeds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns, for each configuration that ran with two seeds or more, each figure's mean, spread, least and most.

    The spread is the standard deviation over seeds, with n - 1; figures are each run's newest.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        rest = {key: value for key, value in flatten(run.config).items() if key not in ("seed", *LOCAL)}
        groups.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(run)
    made = []
    for group in groups.values():
        seeds = {run.config.get("seed") for run in group}
        if len(seeds) < 2:
            continue
        shared = set.intersection(*({comparable(row) for row in run.evaluations} for run in group))
        newest = [_newest(run, shared) for run in group]
        tags = sorted({tag for tags in newest for tag in tags if tag in LAST or tag.startswith("evaluate/")} - {*COSTS})
        rows = []
        for tag in tags:
            values = [float(one[tag]) for one in newest if one.get(tag) is not None]
            if len(values) > 1:
                spread = (statistics.mean(values), statistics.stdev(values), min(values), max(values))
                rows.append((tag, [*spread, len(values)]))
        steps = sorted({run.step for run in group})
        at = (
            f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}: not all are equally far"
        )
        made.append({"names": ", ".join(run.name for run in group), "seeds": len(seeds), "at": at, "rows": rows})
    return made


def _newest(run: Run, shared: set[str]) -> dict[str, Any]:
    """Returns the newest of each of a run's figures, those of `gan-dist evaluate` by a `shared` protocol among them."""
    found = {tag: value for point in run.points for tag, value in point.items()}
    last: dict[str, Any] = next((row for row in reversed(run.evaluations) if comparable(row) in shared), {})
    rest = ("step", "images_seen", "epoch")
    return found | {
        f"evaluate/{key}": value
        for key, value in last.items()
        if key not in rest and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _shown(value: Any) -> Any:
    """Returns a value as a configuration file would have it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _templates() -> Environment:
    made = Environment(
        loader=FunctionLoader(lambda name: (HERE / "templates" / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["shown"] = _shown
    made.filters["rows"] = lambda values: [(key, (value,)) for key, value in flatten(values).items()]
    made.globals["asset"] = lambda name: Markup((HERE / "assets" / name).read_text(encoding="utf-8"))
    made.globals["now"] = lambda: format_time(time.time())
    made.policies["json.dumps_kwargs"] = {"default": vars}  # the frames of a film are dataclasses
    return made


templates = _templates()

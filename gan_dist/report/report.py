"""A run -> one self-contained HTML page; several runs -> one page that lays them side by side.

The page carries its pictures, curves and few lines of script with it; its content policy forbids every request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from gan_dist.data.prepare.account import REASONS
from gan_dist.data.shards import read_manifest
from gan_dist.report.charts import render
from gan_dist.report.compare import side_by_side
from gan_dist.report.curves import curves, median, seconds_trained
from gan_dist.report.films import film, still
from gan_dist.report.history import commands, entries
from gan_dist.report.page import (
    command,
    document,
    facts,
    film_script,
    flatten,
    history,
    reel,
    remark,
    section,
    shown,
    table,
)
from gan_dist.runs.metrics_file import format_time
from gan_dist.runs.record import Run, by_protocol, read_run
from gan_dist.telemetry.console import duration
from gan_dist.telemetry.gallery import dataset_card
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import expand, write_atomically

FILM_BUDGET = 5_500_000
"""Bytes that the pictures of the evolution take on a page, over all its runs; a page stays below 10 MB."""
STILLS_BUDGET = 2_500_000


def make_report(
    runs: Sequence[str | Path] | str | Path,
    out: str | Path | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Returns the page written: RUN/report.html, or for several runs `out` (default report.html here).

    presets: configurations by name, as plain nested values; a run is held against the one it is most like. A run in
    progress, a crashed or an empty one is told as far as it got. Raises UserError where there is no such run.
    """
    paths = [runs] if isinstance(runs, str | Path) else list(runs)
    if not paths:
        raise UserError("expected a run, or several")
    told = [_with_dataset(read_run(path)) for path in paths]
    target = expand(out) if out else told[0].path / "report.html" if len(told) == 1 else expand("report.html")
    body = _one(told[0], presets or {}) if len(told) == 1 else side_by_side(told, FILM_BUDGET)
    title = " and ".join(run.name for run in told) if len(told) < 4 else f"{len(told)} runs"
    try:
        write_atomically(target, document(title, body).encode())
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


def _one(run: Run, presets: Mapping[str, Mapping[str, Any]]) -> str:
    charts = "".join(render(chart) for chart in curves(run))
    lead = "Faint lines are what was logged, strong ones its moving average; dotted verticals are restarts."
    nothing = remark("Nothing is logged yet; a point comes every log.scalars_every steps.")
    return "\n".join(
        [
            _head(run),
            _pictures(run),
            _evolution(run),
            section("How the game went", *((lead, f'<div class="charts">{charts}</div>') if charts else ("", nothing))),
            *([_evaluations(run)] if run.evaluations else []),
            _dataset(run.dataset),
            _configuration(run, presets),
            section("What happened", "", history(entries(run))),
            section("Where it ran", "", facts(run.environment) if run.environment else remark("Not recorded.")),
            section("What to do next", "", "".join(command(what, words) for what, words in commands(run))),
        ]
    )


def _head(run: Run) -> str:
    newest = run.points[-1] if run.points else {}
    state = {"running": "in progress", "empty": "not begun"}.get(run.state, run.state)
    rate, seconds = median(run, "throughput/images_per_second"), seconds_trained(run)
    tiles = [
        (f"{run.step:,}", f"of {run.total:,} steps" if run.total > run.step else "steps"),
        (f"{newest.get('images_seen') or 0:,}", "images seen"),
        (f"{newest.get('progress/epoch') or 0:.2f}", "epochs"),
        (f"{rate:,.0f}" if rate else "unknown", "images/s (median)"),
        (duration(seconds) if seconds else "none yet", "of training"),
        (f"{run.dataset['samples']:,}" if run.dataset.get("samples") else "unknown", "images to learn from"),
    ]
    counted = "".join(f"<div><b>{number}</b><span>{what}</span></div>" for number, what in tiles)
    heard = f"last heard of {format_time(run.touched)}" if run.touched else "nothing heard of it yet"
    told = f"{heard}: {run.why}" if run.why else heard
    return (
        f'<header><span class="over">Training run</span><h1>{escape(run.name)}</h1>'
        f'<p><span class="chip {run.state}">{state}</span><span class="lead">{escape(told)}</span></p>'
        f'<div class="tiles">{counted}</div></header>'
    )


def _pictures(run: Run) -> str:
    def picture(path: Path | None, what: str, detail: str, missing: str) -> str:
        src = still(path, STILLS_BUDGET // 2) if path else None
        if src is None:
            return f'<figure class="picture">{remark(missing)}</figure>'
        return (
            f'<figure class="picture"><img src="{src}" alt="{escape(what, quote=True)}">'
            f"<figcaption><b>{escape(what)}</b><span>{escape(detail)}</span></figcaption></figure>"
        )

    step, newest = run.samples[-1] if run.samples else (0, None)
    drawn = picture(newest, "What it draws", f"step {step:,}", "No grid was drawn yet.")
    real = picture(run.real, "What it learns from", "real images", "No grid of real images was drawn.")
    return f'<section><div class="pair" id="pictures">{drawn}{real}</div></section>'


def _evolution(run: Run) -> str:
    frames = film(run.samples, FILM_BUDGET)
    if not frames:
        missing = "No grid was drawn yet; one comes every log.samples_every steps."
        return section("How it learned to", "", remark(missing))
    last = frames[-1]
    slider = reel(len(frames), f"step {last.step:,}") if len(frames) > 1 else ""
    moments = f"{len(frames)} moments" if len(frames) > 1 else "one moment"
    return section(
        "How it learned to",
        f"The same latents at {moments} of training.",
        f'<figure class="picture film" data-film="film-0"><img src="{last.src}" '
        f'alt="What the fixed latents gave at step {last.step}">{slider}</figure>{film_script(frames, "film-0")}',
    )


def _evaluations(run: Run) -> str:
    told = []
    for rows in by_protocol(run.evaluations):
        keys = list(dict.fromkeys(key for row in rows for key in row if key not in ("step", "protocol", "images_seen")))
        cells = [(f"{row['step']:,}", [_figure(row.get(key)) for key in keys]) for row in rows]
        heads = [escape(key.replace("_", " ")) for key in keys]
        known = [row["protocol"] for row in reversed(rows) if row.get("protocol")]
        protocol = max(known, key=lambda one: one.get("inception") is not None, default=None)
        best = min(rows, key=lambda row: row["swd"])
        whose = ""
        if protocol:
            averaged = "Averaged" if protocol["averaged"] else "Trained"
            whose = f"{averaged} generator, {protocol['samples']:,} images against as many real ones: "
        told.append(
            f'<p class="lead">{whose}nearest at step {best["step"]:,}.</p>'
            + f'<div class="figures">{table(("step", *heads), cells)}</div>'
            + (f"<details><summary>How it was measured</summary>{facts(protocol)}</details>" if protocol else "")
        )
    lead = "Sliced Wasserstein distance (swd) from real images: lower is better, within one table."
    return section("How good it is", lead, "".join(told))


def _figure(value: Any) -> str:
    """Returns a cell: shares with three digits, distances with four, hashes by what they begin with."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"
    return "" if value is None else escape(str(value)[:8])


def _dataset(card: Mapping[str, Any]) -> str:
    if not card:
        missing = "The dataset is not here, and the run kept no card of it."
        return section("What it learned from", "", remark(missing))
    rejected, skipped = (_counts(card.get(key)) for key in ("rejected", "skipped"))
    pieces = [
        ("written", int(card.get("written") or card.get("samples") or 0)),
        ("rejected", sum(rejected.values())),
        ("replaced", int(card.get("replaced") or 0)),
        ("skipped", sum(skipped.values())),
    ]
    whole = sum(count for _, count in pieces)
    there = [(i, name, count) for i, (name, count) in enumerate(pieces) if count]
    bar = "".join(f'<span class="b{i}" style="flex:{count} 0 0"></span>' for i, _, count in there)
    legend = "".join(f'<span><i class="b{i}"></i>{name} {count:,}</span>' for i, name, count in there)
    reasons = ""
    if rejected:
        rows = [
            (reason, [f"{count:,}", escape(REASONS.get(reason, ""))])
            for reason, count in sorted(rejected.items(), key=lambda item: -item[1])
        ]
        reasons = "<h3>Rejected, and why</h3>" + table(("reason", "images", "meaning"), rows)
    rest = {key: value for key, value in card.items() if key not in ("rejected", "written")}
    return section(
        "What it learned from",
        f"{pieces[0][1]:,} images of {escape(str(card.get('resolution', '?')))} pixels a side, out of "
        f"{int(card.get('seen') or whole):,} files that preparation saw; each is accounted for.",
        f'<div class="bar">{bar}</div><p class="legend">{legend}</p>{reasons}'
        f"<details><summary>The dataset in full</summary>{facts(rest)}</details>",
    )


def _counts(value: Any) -> dict[str, int]:
    """Returns counts by reason; a bare number has none."""
    if isinstance(value, Mapping):
        return {str(key): int(count) for key, count in value.items()}
    return {"not recorded": int(value)} if value else {}


def _configuration(run: Run, presets: Mapping[str, Mapping[str, Any]]) -> str:
    mine = flatten(run.config)
    everything = f"<details><summary>All {len(mine)} keys</summary>{facts(mine)}</details>"
    differences = {name: _differences(mine, flatten(preset)) for name, preset in presets.items()}
    if not differences:
        return section("How it was set", "", everything)
    name, differing = min(differences.items(), key=lambda item: len(item[1]))
    if not differing:
        return section("How it was set", f"Exactly as the preset <b>{escape(name)}</b>.", everything)
    rows = ((key, [shown(new), shown(old)]) for key, (old, new) in differing.items())
    keys = "1 key" if len(differing) == 1 else f"{len(differing)} keys"
    return section(
        "How it was set",
        f"Unlike the preset nearest to it, <b>{escape(name)}</b>, in {keys}.",
        table(("key", "this run", escape(name)), rows, "differs") + everything,
    )


def _differences(mine: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (preset's, run's)}; where the data lie is everybody's own."""
    keys = sorted((mine.keys() | preset.keys()) - {"data.shards", "data.cache_dir"})
    return {key: (preset.get(key), mine.get(key)) for key in keys if preset.get(key) != mine.get(key)}

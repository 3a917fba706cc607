"""Several runs side by side: what sets them apart, how each went, what each draws."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from gan_dist.report.charts import render
from gan_dist.report.curves import compared, median, seconds_trained
from gan_dist.report.films import film
from gan_dist.report.history import entries
from gan_dist.report.page import film_script, flatten, history, reel, remark, section, shown, table
from gan_dist.runs.record import Run
from gan_dist.telemetry.console import duration

LAST = ("loss/discriminator", "loss/generator", "probability/real", "probability/fake", "evaluate/swd")
"""Tags whose newest values the first table shows, where any of the runs has them."""


def side_by_side(runs: Sequence[Run], film_budget: int) -> str:
    """Returns the body of a page on several runs, whose films take `film_budget` bytes together."""
    heads = ["", *(_key(number) + escape(run.name) for number, run in enumerate(runs))]
    newest = [run.points[-1] if run.points else {} for run in runs]
    rows = [
        ("state", [f'<span class="chip {run.state}">{run.state}</span>' for run in runs]),
        ("step", [f"{run.step:,} of {run.total:,}" for run in runs]),
        ("images seen", [f"{point.get('images_seen', 0):,}" for point in newest]),
        ("images a second", [f"{median(run, 'throughput/images_per_second') or 0:,.0f}" for run in runs]),
        ("time trained", [duration(seconds_trained(run)) for run in runs]),
        ("dataset", [escape(str(run.dataset.get("manifest", "unknown"))[:12]) for run in runs]),
    ]
    logged = [tag for tag in LAST if any(point.get(tag) is not None for point in newest)]
    rows += [(f"{tag}, last", [shown(point.get(tag)) for point in newest]) for tag in logged]
    flats = [flatten(run.config) for run in runs]
    keys = sorted({key for flat in flats for key in flat})
    differing = [key for key in keys if len({json.dumps(flat.get(key)) for flat in flats}) > 1]
    settings = table(heads, ((key, [shown(flat.get(key)) for flat in flats]) for key in differing))
    charts = "".join(render(chart) for chart in compared(runs))
    title = f"{len(runs)} runs"
    return "\n".join(
        [
            f'<header><span class="over">Side by side</span><h1>{title}</h1></header>',
            table(heads, rows),
            section("What they draw", "Each run at the same share of its own training.", _films(runs, film_budget)),
            section(
                "What sets them apart",
                f"{len(differing)} of {len(keys)} keys differ.",
                settings if differing else remark("The runs have the same configuration."),
            ),
            section(
                "How the games went",
                "Over images seen, so that the size of a batch does not matter.",
                f'<div class="charts">{charts}</div>' if charts else remark("Nothing is logged yet."),
            ),
            *(section(f"What happened in {run.name}", "", history(entries(run))) for run in runs),
        ]
    )


def _key(number: int) -> str:
    """Returns the stroke that marks a run's curves everywhere on the page."""
    return f'<span class="legend key"><i class="s{number % 6}"></i></span>'


def _films(runs: Sequence[Run], budget: int) -> str:
    films = [film(run.samples, budget // len(runs)) for run in runs]
    cards = []
    for number, (run, frames) in enumerate(zip(runs, films, strict=True)):
        if not frames:
            cards.append(f'<figure class="picture">{remark(f"{run.name} has drawn no grid yet.")}</figure>')
            continue
        last = frames[-1]
        cards.append(
            f'<figure class="picture" data-film="film-{number}"><img src="{last.src}" '
            f'alt="What the fixed latents gave at step {last.step}"><figcaption><b>{_key(number)}{escape(run.name)}</b>'
            f"<span data-step>step {last.step:,}</span></figcaption></figure>"
        )
    longest = max(map(len, films))
    slider = reel(longest, "100%") if longest > 1 else ""
    scripts = "".join(film_script(frames, f"film-{number}") for number, frames in enumerate(films) if frames)
    return f'{slider}<div class="runs">{"".join(cards)}</div>{scripts}'

"""The curves of a run, and the few figures that sum it up."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence

from gan_dist.report.charts import Chart, Series
from gan_dist.runs.record import Run, by_protocol

COSTS = ("evaluate/seconds", "evaluate/share_of_time")
"""The cost of evaluations during training."""
UNDRAWN = {"epoch", "kid_std", "seconds", "share_of_time"}
"""Figures of an evaluation that have no curve of their own."""


def points_of(run: Run, tag: str, x: str = "step") -> list[tuple[float, float | None]]:
    """Returns (x, value) of `tag` wherever the run logged it."""
    return [(float(point[x]), point[tag]) for point in run.points if tag in point and x in point]


def median(run: Run, tag: str) -> float | None:
    """Returns the median of a tag, or None where it was never logged."""
    values = [value for _, value in points_of(run, tag) if value is not None]
    return statistics.median(values) if values else None


def seconds_trained(run: Run) -> float:
    """Returns the seconds that the logged steps took: images over images a second, added up over the points."""
    total, before = 0.0, 0
    for point in run.points:
        rate, seen = point.get("throughput/images_per_second"), point.get("images_seen", before)
        if rate:
            total += max(0, seen - before) / rate
        before = seen
    return total


def restarts(run: Run, x: str = "step") -> list[float]:
    """Returns the x of each step at which the run was continued."""
    steps = {int(event["step"]) for event in run.events if event["event"] == "start" and event.get("step")}
    if x == "step":
        return sorted(map(float, steps))
    seen = {int(point["step"]): float(point.get(x, 0)) for point in run.points}
    return sorted(seen[step] for step in steps if step in seen)


def curves(run: Run) -> list[Chart]:
    """Returns the charts of one run: the game, its optimisation, its speed, and whatever else it logged."""
    marks = restarts(run)
    used: set[str] = {"progress/epoch"}

    def chart(title: str, tags: dict[str, str], note: str = "", **more: object) -> Chart:
        used.update(tags)
        series = [Series(name, points_of(run, tag)) for tag, name in tags.items()]
        return Chart(title, [one for one in series if one.points], note, marks=marks, **more)  # type: ignore[arg-type]

    charts = [
        chart("Losses", {"loss/discriminator": "discriminator", "loss/generator": "generator"}),
        chart(
            "Probability of being real, by the discriminator",
            {
                "probability/real": "D(x)",
                "probability/fake": "D(G(z))",
                "probability/fake_after_update": "D(G(z)) after its update",
            },
            "At one half it cannot tell real from fake.",
            low=0.0,
            high=1.0,
            line=(0.5, "cannot tell"),
        ),
        chart(
            "Value of the game, V(D, G)",
            {"value/minimax": "V"},
            "E log D(x) + E log(1 - D(G(z))): D raises it, G lowers it.",
            high=0.0,
            line=(-math.log(4), "equilibrium, -log 4"),
        ),
        chart(
            "Jensen-Shannon divergence",
            {"value/jsd_lower_bound": "lower bound"},
            "A lower bound in nats, as tight as D is good; 0: real and fake are alike, log 2: nothing in common.",
            low=0.0,
            high=math.log(2),
        ),
        chart(
            "Gradient norms",
            {"gradient_norm/discriminator": "discriminator", "gradient_norm/generator": "generator"},
            log=True,
        ),
        chart(
            "Update-to-weight ratio",
            {"update_ratio/discriminator": "discriminator", "update_ratio/generator": "generator"},
            "Norm of a step over norm of the weights; about 0.001 is healthy.",
            log=True,
        ),
        chart("Images a second", {"throughput/images_per_second": "images/s"}, low=0.0),
        chart(
            "Waiting for data",
            {"throughput/data_wait_fraction": "share of time"},
            "0: the data were always there in time.",
            low=0.0,
            high=0.05,
        ),
    ]
    charts += _evaluations(run, marks)
    # These are shown elsewhere on the page; everything else that was logged gets a chart.
    used |= {"throughput/step_seconds", "updates/skipped", "learning_rate/discriminator", "learning_rate/generator"}
    others = sorted({tag for point in run.points for tag in point if "/" in tag} - used)
    others = [tag for tag in others if not tag.startswith("evaluate/") or tag in COSTS]
    charts += [chart(tag, {tag: tag.rpartition("/")[2].replace("_", " ")}) for tag in others]
    return [one for one in charts if one.series]


def _evaluations(run: Run, marks: Sequence[float]) -> list[Chart]:
    """Returns the charts of the largest group of evaluations that may be compared."""
    rows = by_protocol(run.evaluations)[0] if run.evaluations else []
    drawn: set[str] = set()

    def chart(title: str, keys: Sequence[str], note: str, high: float | None = None) -> Chart:
        drawn.update(keys)
        points = {key: [(float(row["step"]), row[key]) for row in rows if row.get(key) is not None] for key in keys}
        series = [Series(key.replace("_", " "), points[key]) for key in keys if points[key]]
        return Chart(title, series, note, low=0.0, high=high, marks=marks)

    def levels(name: str) -> list[str]:
        sides = {int(match[1]) for row in rows for key in row if (match := re.fullmatch(rf"{name}_(\d+)", key))}
        return [name, *(f"{name}_{side}" for side in sorted(sides, reverse=True))]

    charts = [
        chart(
            "Distance from real images",
            [*levels("swd"), "swd_floor"],
            "Sliced Wasserstein distance of patches, in all and at each size of structure; lower is nearer.",
        ),
        chart("Distance in ProGAN's published form", levels("swd_progan"), "Comparable with published figures."),
        chart("FID", ["fid"], "Frechet distance of Inception's features; lower is nearer."),
        chart("KID", ["kid"], "Kernel distance of Inception's features; lower is nearer."),
        chart(
            "Precision and recall",
            ["precision", "recall"],
            "The share of samples that might be real, and of real images that might be samples.",
            high=1.0,
        ),
        chart(
            "Feature distance",
            ["feature_distance", "feature_distance_floor"],
            "Frechet distance of the features of an encoder that learned from the dataset; lower is nearer.",
        ),
        chart(
            "Precision and recall of the encoder's features",
            ["feature_precision", "feature_recall"],
            "The share of samples that might be real, and of real images that might be samples.",
            high=1.0,
        ),
        chart(
            "Accuracy of the discriminator",
            ["accuracy_training", "accuracy_held_out"],
            "The share of real images that it takes for real; if they differ much, it has learned its own by heart.",
            high=1.0,
        ),
        chart("Diversity of samples", ["diversity"], "1: samples differ as much as real images do; 0: all are alike."),
    ]
    rest = sorted({key for row in rows for key in row if isinstance(row[key], float)} - drawn - UNDRAWN)
    return charts + [chart(key.replace("_", " ").capitalize(), [key], "") for key in rest]


def compared(runs: Sequence[Run]) -> list[Chart]:
    """Returns the charts of several runs: one a tag, a curve a run, over images seen."""

    def chart(title: str, tag: str, note: str = "", **more: object) -> Chart:
        series = [Series(run.name, points_of(run, tag, "images_seen")) for run in runs]
        return Chart(title, series, note, x_name="images seen", **more)  # type: ignore[arg-type]

    charts = [
        chart("Discriminator's loss", "loss/discriminator"),
        chart("Generator's loss", "loss/generator"),
        chart("D(x), real images", "probability/real", low=0.0, high=1.0, line=(0.5, "cannot tell")),
        chart("D(G(z)), samples", "probability/fake", low=0.0, high=1.0, line=(0.5, "cannot tell")),
        chart("Value of the game, V(D, G)", "value/minimax", high=0.0, line=(-math.log(4), "equilibrium, -log 4")),
        chart("Images a second", "throughput/images_per_second", low=0.0),
    ]
    others = sorted({tag for run in runs for point in run.points for tag in point if tag.startswith("evaluate/")})
    charts += [chart(tag, tag) for tag in others]
    return [one for one in charts if any(series.points for series in one.series)]

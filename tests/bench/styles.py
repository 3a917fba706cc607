"""Does a game with classes paint the class that is asked, and at what cost? Against the same game without.

python -m tests.bench.styles FOLDER [--work DIR] [--epochs 30] [--samples 5000] [--seeds 0 1 2] [SECTION.KEY=VALUE]...

FOLDER holds a folder of pictures for each class, for example CIFAR-10's. It is prepared at 32 pixels with `--labels
folders`, an encoder learns from it without labels, and both games are played from each seed. Printed for each: the
distance and diversity, and how often a classifier sees the class that was asked, beside chance; then means over seeds.
Run it again to go on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gan_dist.data.dataset import open_dataset
from gan_dist.data.prepare.prepare import prepare
from gan_dist.distributed.world import World
from gan_dist.evaluation import encoder
from gan_dist.evaluation.evaluate import EvaluationOptions, evaluate_run
from gan_dist.sampling.sample import sample_run
from gan_dist.training.trainer import train

GAMES = {"without": ["model.classes=none"], "with classes": ["model.classes=dataset"]}
FIGURES = (
    *("swd", "swd_floor", "feature_distance", "feature_recall", "diversity", "repeated"),
    *("class_agreement", "class_agreement_chance", "class_agreement_real"),
)
SMALL = ["model.resolution=32", "model.g_channels=16", "model.d_channels=16", "train.global_batch=64"]


def compare(
    folder: Path,
    work: Path,
    epochs: float,
    samples: int,
    words: list[str],
    seeds: Sequence[int] = (0,),
    encoder_images: int = 100_000,
) -> dict[str, list[dict[str, Any]]]:
    """Returns the figures of each game by name, a row a seed, having played what is not played yet."""
    shards = work / "shards"
    prepare([folder], shards, resolution=32, labels="folders")
    with open_dataset(shards) as real:
        if not (shards / encoder.FILE).exists():
            encoder.make_encoder(real, shards / encoder.FILE, encoder_images, 0, torch.device("cpu"))
    names = sorted({each.name for each in folder.iterdir() if each.is_dir()})[:10]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in GAMES}
    for seed in seeds:
        for name, game in GAMES.items():
            run = work / f"{name.replace(' ', '-')}-s{seed}"
            settings = [*SMALL, f"seed={seed}", f"train.epochs={epochs}", *game, *words]
            train({"data": {"shards": str(shards)}}, settings, run_dir=run, console=False, report_at_end=False)
            options = EvaluationOptions(samples=samples, inception="none", floor=True)
            (row,) = evaluate_run(World(), run, options)
            rows[name].append({"images": row["images_seen"], **{key: row[key] for key in FIGURES if key in row}})
            if name == "with classes":
                sample_run(run, classes=",".join(names), count=8 * len(names), out=work / f"classes-s{seed}.png")
    return rows


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns each figure's mean over the seeds."""
    return {key: statistics.mean(row[key] for row in rows) for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, default=Path("styles"))
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("words", nargs="*")
    asked = parser.parse_intermixed_args()
    rows = compare(asked.folder, asked.work, asked.epochs, asked.samples, asked.words, asked.seeds)
    overall = {name: means(found) for name, found in rows.items()}
    print(json.dumps({"seeds": asked.seeds, "rows": rows, "means": overall}, indent=2))
    found = overall["with classes"]
    times = found["class_agreement"] / found["class_agreement_chance"]
    print(
        f"the asked class is seen {times:.1f} times as often as by chance; a row a class in {asked.work}/classes-s*.png"
    )


if __name__ == "__main__":
    main()

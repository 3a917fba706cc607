"""Recipes beside one another: which paints better from the same images, at equal images and in equal time.

    python -m tests.bench.ladder run HOME --data TRAIN --select A --report B --encoder FILE [--seeds 0 1 2]
    python -m tests.bench.ladder cost HOME
    python -m tests.bench.ladder table HOME
    python -m tests.bench.ladder page HOME --out page.html

`run` trains every recipe with every seed, the first seed of all first, and evaluates each checkpoint on two held-out
datasets: recipes and checkpoints are chosen by the figures on A, and the figures on B are those to quote. A run that is
done adds a line to HOME/ladder.jsonl; started again, it goes on where it stopped, and with another number of --images
it climbs anew beside the other. `cost` times the recipes' steps in
turn, for equal time cannot be read from runs that shared a machine. Nothing is left out of the table.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml

from gan_dist.config.schema import Config, load_config
from gan_dist.data.dataset import open_dataset
from gan_dist.runs.record import read_run
from tests.bench.compare_keys import a_step

FIGURES = ("swd", "feature_distance", "feature_precision", "feature_recall", "diversity", "repeated")
BASELINE = "thesis"


def words_of(recipes: dict[str, Any], name: str) -> list[str]:
    """Returns the overrides of a recipe; one that goes out from another one has that one's list as an item."""

    def flat(items: list[Any]) -> list[str]:
        return [word for item in items for word in (flat(item) if isinstance(item, list) else [item])]

    return flat([recipes["common"], recipes["recipes"][name]])


class Ladder:
    """The runs of a home."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.home, self.args = Path(args.home), args
        self.recipes = yaml.safe_load(Path(args.recipes).read_text())
        self.lines = self.home / "ladder.jsonl"

    def climb(self) -> None:
        """Trains and measures all that is not yet done, `jobs` runs at a time."""
        done = {key_of(line) for line in read_lines(self.lines)}
        names, images = self.args.only or list(self.recipes["recipes"]), self.args.images
        wanted = [(name, seed) for seed in self.args.seeds for name in names if (name, seed, images) not in done]
        with ThreadPoolExecutor(self.args.jobs) as pool:
            for line in pool.map(lambda one: self._run(*one), wanted):
                print(line, flush=True)

    def _run(self, name: str, seed: int) -> str:
        run, steps = self.home / "runs" / f"{name}-s{seed}-{self.args.images}", self._steps(name)
        words = [f"seed={seed}", f"data.shards={self.args.data}", f"train.epochs={self._epochs()}"]
        every = max(1, steps // self.args.points)
        words += ["checkpoint.keep_epochs=false", f"checkpoint.every_steps={every}", "checkpoint.every_minutes=0"]
        words += [f"checkpoint.keep={self.args.points + 2}", f"log.samples_every={every}"]
        began = time.time()
        if not (run.is_dir() and steps in read_run(run).checkpoints):
            self._call(run, "train", self.recipes["base"], *words, *words_of(self.recipes, name), "--run-dir", str(run))
        line = {
            "recipe": name,
            "run": run.name,
            "seed": seed,
            "overrides": words_of(self.recipes, name),
            "images": self.args.images,
            "select": self._measure(run, self.args.select),
            "report": self._measure(run, self.args.report),
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        }
        with self.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return f"{name} seed {seed}: {line['report'][-1]} after {time.time() - began:.0f} s"

    def _epochs(self) -> float:
        with open_dataset(self.args.data) as dataset:
            return float(self.args.images / dataset.num_samples)

    def _steps(self, name: str) -> int:
        config = load_config(self.recipes["base"], words_of(self.recipes, name))
        return math.ceil(round(int(self.args.images) / images_of_a_step(config), 6))

    def _measure(self, run: Path, dataset: str) -> list[dict[str, float]]:
        """Returns the figures of each of the run's checkpoints against a held-out dataset."""
        more = ["--encoder", self.args.encoder] if self.args.encoder else []
        options = ["--all-checkpoints", "--dataset", dataset, "--inception", "none", "--device", "cpu", "--json", *more]
        rows = json.loads(self._call(run, "evaluate", str(run), *options))
        return [{key: row[key] for key in ("step", "images_seen", *FIGURES) if key in row} for row in rows]

    def _call(self, run: Path, *words: str) -> str:
        """Returns what a command of gan-dist printed; its log is beside the run. Ends the ladder where it failed."""
        run.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "gan_dist", *words]
        path = run.parent / f"{run.name}.log"
        with path.open("ab") as log:
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=log, check=False, text=True)
        if done.returncode:
            said = path.read_text(errors="replace").splitlines()[-1:]
            raise SystemExit(f"{run.name}: {words[0]} failed ({path}): {' '.join(said)}")
        return done.stdout

    def cost(self) -> None:
        """Writes the seconds an image of each recipe, measured in turn by one process on one thread."""
        torch.set_num_threads(1)
        steps, images = {}, {}
        for name in self.recipes["recipes"]:
            config = load_config(self.recipes["base"], ["data.shards=none", *words_of(self.recipes, name)])
            steps[name], images[name] = a_step(config, "fp32"), images_of_a_step(config)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for index in range(self.args.rounds + 1):
            for name, step in steps.items():
                start = time.process_time()
                step()
                if index:
                    seconds[name].append(time.process_time() - start)
        medians = {name: statistics.median(found) / images[name] for name, found in seconds.items()}
        (self.home / "cost.json").write_text(json.dumps(medians, indent=2))
        print(json.dumps({name: round(value / medians[BASELINE], 3) for name, value in medians.items()}, indent=2))


def images_of_a_step(config: Config) -> int:
    """Returns how many real images D sees in a step."""
    return config.train.global_batch * config.optim.d_steps


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of finished runs, in the order in which they ended; of one that was run twice, the last."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({key_of(line): line for line in lines}.values())


def key_of(line: dict[str, Any]) -> tuple[str, int, int]:
    """Returns what tells a run from the others: recipe, seed, images."""
    return line["recipe"], line["seed"], line["images"]


def best_row(line: dict[str, Any], limit: float = math.inf) -> dict[str, Any]:
    """Returns the figures, on the half to quote, of the checkpoint that is best on the other, up to `limit` images."""
    key = FIGURES[1] if FIGURES[1] in line["select"][0] else FIGURES[0]
    rows = [row for row in line["select"] if row["images_seen"] and row["images_seen"] <= limit]
    step = min(rows, key=lambda row: float(row[key]))["step"]
    return next(row for row in line["report"] if row["step"] == step)


def summaries(home: Path) -> Iterator[dict[str, Any]]:
    """Yields, a recipe and a number of images at a time, its cost and the figures of its runs: at the last, at the best
    and in equal time."""
    lines = read_lines(home / "ladder.jsonl")
    costs = json.loads((home / "cost.json").read_text()) if (home / "cost.json").exists() else {}
    several = len({line["images"] for line in lines}) > 1
    for name, images in dict.fromkeys((line["recipe"], line["images"]) for line in lines):
        runs = [line for line in lines if (line["recipe"], line["images"]) == (name, images)]
        ratio = costs[name] / costs[BASELINE] if name in costs else None
        most = min(run["report"][-1]["images_seen"] for run in runs)
        yield {
            "recipe": f"{name}, {images:,} images" if several else name,
            "runs": runs,
            "cost": ratio,
            "end": [run["report"][-1] for run in runs],
            "best": [best_row(run) for run in runs],
            "equal_time": [nearest_row(run, most / max(ratio or 1, 1)) for run in runs],
        }


def nearest_row(line: dict[str, Any], images: float) -> dict[str, Any]:
    """Returns the figures on the reported half at the last checkpoint that needed no more than `images`."""
    return max((row for row in line["report"] if row["images_seen"] <= images), key=lambda row: row["images_seen"])


def cell(rows: list[dict[str, Any]], key: str) -> str:
    """Returns the mean of a figure over the seeds, and its range."""
    values = [row[key] for row in rows if key in row]
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3g}-{max(values):.3g})"


def table(home: Path) -> str:
    """Returns the table of all runs in Markdown: means over the seeds, with their ranges."""
    head = (
        "| recipe | seeds | cost | swd | feature distance | precision | recall | diversity | in equal time: swd, fd |"
    )
    out = [head, "|---" * (head.count("|") - 1) + "|"]
    for one in summaries(home):
        figures = [cell(one["end"], key) for key in FIGURES[:5]]
        equal = ", ".join(cell(one["equal_time"], key) for key in FIGURES[:2])
        cost = f"{one['cost']:.2f}" if one["cost"] else ""
        out.append("| " + " | ".join([one["recipe"], str(len(one["runs"])), cost, *figures, equal]) + " |")
    return "\n".join(out)


PAGE = """<!doctype html><meta charset="utf-8"><title>Recipes</title>
<style>body { font: 14px sans-serif } td { vertical-align: top; padding: 4px } img { width: 260px }</style>
<h1>The same latents, recipe by recipe</h1>
<table>{% for row in rows %}<tr><th>{{ row.name }}</th>{% for picture in row.pictures %}
<td>{{ picture.title }}<br><img src="data:image/png;base64,{{ picture.data }}"></td>{% endfor %}
</tr>{% endfor %}</table>
"""


def page(home: Path, out: Path) -> None:
    """Writes a page with each run's grids: after a quarter and half of the images, at the end, and in equal time."""
    rows = []
    for one in summaries(home):
        for run in one["runs"]:
            grids = dict(read_run(home / "runs" / run.get("run", f"{run['recipe']}-s{run['seed']}")).samples)
            last, steps = run["report"][-1], [row["step"] for row in run["report"]]
            equal = nearest_row(run, last["images_seen"] / max(one["cost"] or 1, 1))["step"]
            wanted = [
                (f"{share:.0%} of the images", nearest_step(steps, share * last["step"])) for share in (0.25, 0.5, 1)
            ]
            wanted.append(("in the baseline's time", equal))
            pictures = [
                {"title": f"{title}: step {step}", "data": base64.b64encode(grids[step].read_bytes()).decode()}
                for title, step in wanted
                if step in grids
            ]
            rows.append({"name": f"{one['recipe']}, seed {run['seed']}", "pictures": pictures})
    out.write_text(jinja2.Environment(autoescape=True).from_string(PAGE).render(rows=rows))


def nearest_step(steps: list[int], wanted: float) -> int:
    return min(steps, key=lambda step: abs(step - wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "cost", "table", "page"))
    parser.add_argument("home")
    parser.add_argument("--out", default="page.html", help="where the page is written")
    parser.add_argument("--recipes", default=str(Path(__file__).with_name("recipes.yaml")))
    parser.add_argument("--only", nargs="*", help="some of the recipes")
    parser.add_argument("--data")
    parser.add_argument("--select")
    parser.add_argument("--report")
    parser.add_argument("--encoder")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=400_000)
    parser.add_argument("--points", type=int, default=8, help="checkpoints that are measured")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if args.what == "run":
        ladder = Ladder(args)
        if unknown := set(args.only or ()) - set(ladder.recipes["recipes"]):
            parser.error(f"--only: no recipe {min(unknown)!r} in {args.recipes}")
        if missing := [option for option in ("data", "select", "report") if not getattr(args, option)]:
            parser.error(f"run needs --{missing[0]}")
        ladder.climb()
    elif args.what == "cost":
        Ladder(args).cost()
    elif args.what == "table":
        print(table(Path(args.home)))
    else:
        page(Path(args.home), Path(args.out))


if __name__ == "__main__":
    main()

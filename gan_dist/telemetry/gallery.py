"""The pictures and texts of a run in training: grids of fixed latents, walks between them, dataset and environment."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gan_dist.config.diff import flatten
from gan_dist.data.classes import NO_CLASSES
from gan_dist.data.dataset import Dataset
from gan_dist.data.shards import Manifest
from gan_dist.model.networks import Generator
from gan_dist.runs.metrics_file import markdown_table
from gan_dist.sampling.generate import interpolate, render
from gan_dist.telemetry.telemetry import Picture, Telemetry
from gan_dist.utils.files import write_atomically
from gan_dist.utils.pictures import from_pil, grid, named_rows
from gan_dist.utils.tensors import HostCopy

WALK_ROWS, WALK_COLUMNS = 4, 8
CLASS_ROWS, CLASS_COLUMNS = 16, 8


class Gallery:
    """Draws what `generator` makes of `fixed_latents` [N, Z], again and again as it learns; used on rank 0 alone."""

    def __init__(self, run_dir: Path, telemetry: Telemetry, generator: torch.nn.Module, fixed_latents: Tensor) -> None:
        self._run_dir, self._telemetry, self._generator = run_dir, telemetry, generator
        latents, device = fixed_latents.cpu(), next(generator.parameters()).device
        pairs = latents[: 2 * min(WALK_ROWS, len(latents) // 2)]
        walks = [interpolate(start, end, WALK_COLUMNS) for start, end in zip(pairs[::2], pairs[1::2], strict=True)]
        self._num_fixed = len(latents)
        # On the device from now on: to bring them there at each drawing would wait for all that it has to do.
        self._latents = torch.cat([latents, *walks]).to(device)
        self._classes = generator.classes if isinstance(generator, Generator) else NO_CLASSES
        if self._classes.names:
            fixed = self._classes.draw(len(latents), 0)
            walked = fixed[: 2 * len(walks) : 2].repeat_interleave(WALK_COLUMNS)  # each in its beginning's class
            self._labels, self._rows = torch.cat([fixed, walked]).to(device), self._classes.largest(CLASS_ROWS)
            columns = self._latents[: min(CLASS_COLUMNS, len(latents))]
            self._class_latents = columns.repeat(len(self._rows), 1)
            self._class_labels = torch.tensor(self._rows).repeat_interleave(len(columns)).to(device)

    def draw(self, step: int) -> None:
        """Draws the fixed latents to samples/ and TensorBoard, a strip of walks between them to TensorBoard, and, of a
        generator with classes, the same latents in each of the largest classes to both: a row for each class.

        Queues it all, and waits for no GPU.
        """
        fixed, all_, folder = self._num_fixed, len(self._latents), self._run_dir / "samples"
        pictures = [
            Picture("samples/fixed_latents", lambda images: grid(images[:fixed]), folder / f"step-{step:08d}.png")
        ]
        if all_ > fixed:
            pictures.append(Picture("samples/interpolation", lambda images: grid(images[fixed:all_], WALK_COLUMNS)))
        inputs = [self._latents]
        if isinstance(self._generator, Generator) and self._classes.names:
            parts = ((self._latents, self._labels), (self._class_latents, self._class_labels))
            inputs = [self._generator.with_classes(*part) for part in parts]
            path = folder / f"classes-{step:08d}.png"
            pictures.append(Picture("samples/classes", lambda images: self._page_of_classes(images[all_:]), path))
        images = torch.cat([render(self._generator, each) for each in inputs])
        self._telemetry.images(step, HostCopy(images), pictures)

    def _page_of_classes(self, images: Tensor) -> Tensor:
        names = [self._classes.name(label) for label in self._rows]
        return named_rows(grid(images, len(images) // len(names)), names)

    def introduce(
        self, step: int, dataset: Dataset, reals: Tensor, config: str, environment: Mapping[str, Any]
    ) -> None:
        """Writes configuration, environment and dataset as texts; at step 0 also `reals`, uint8 [N, 3, S, S].

        Called at every start: the machine may be another one. The dataset's card also goes into the run directory, so
        that a report can be made where the dataset is not.
        """
        card = dataset_card(dataset.root, dataset.manifest)
        content = json.dumps(card, indent=2).encode() + b"\n"
        write_atomically(self._run_dir / "dataset.json", content)
        self._telemetry.text("config", step, f"```yaml\n{config}\n```")
        self._telemetry.text("environment", step, as_table(environment))
        self._telemetry.text("dataset", step, as_table(card))
        if step == 0:
            self._telemetry.image("samples/real", 0, grid(reals), self._run_dir / "samples" / "real.png")
            sheet = dataset.root / "contact_sheet.png"
            if sheet.is_file():
                with Image.open(sheet) as picture:
                    self._telemetry.image("dataset/contact_sheet", 0, from_pil(picture))


def dataset_card(root: Path, manifest: Manifest) -> dict[str, Any]:
    """Returns a dataset's facts for people: path, identity, size, recipe and the account of its source files."""
    reasons: Counter[str] = Counter()
    rejects = root / "rejects.jsonl"
    if rejects.is_file():
        with rejects.open(encoding="utf-8") as lines:
            reasons.update(json.loads(line)["reason"] for line in lines if line.strip())
    totals = {key: value for key, value in manifest.totals.items() if value not in ({}, None)}
    classes = totals.pop("classes", {})
    if isinstance(classes, dict) and classes:
        totals["classes"] = len(classes)
    return {
        "path": str(root),
        "manifest": manifest.identity,
        "resolution": manifest.resolution,
        "samples": manifest.num_samples,
        "shards": len(manifest.shards),
        "recipe": manifest.recipe,
        **totals,
        **({"rejected": dict(reasons.most_common())} if reasons else {}),
    }


def as_table(values: Mapping[str, Any]) -> str:
    """Returns `values` as a Markdown table of names and values; nested mappings become `name.key` rows."""
    rows = flatten(values).items()
    return markdown_table(
        ("", ""), ((name, " ".join(map(str, one)) if isinstance(one, list) else one) for name, one in rows)
    )

"""Datasets written without preparing anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gan_dist.data.shards import FORMAT, MANIFEST, Manifest, ShardWriter


def write_dataset(
    root: Path,
    sizes: tuple[int, ...] = (5, 3),
    resolution: int = 32,
    seed: int = 0,
    labels: Sequence[int | None] = (),
    classes: tuple[str, ...] = ("a", "b"),
) -> np.ndarray:
    """Writes a dataset of noise, its first samples with these `labels`, and returns its samples, uint8 [N, 3, S, S]."""
    root.mkdir(exist_ok=True)
    images = np.random.default_rng(seed).integers(0, 256, (sum(sizes), 3, resolution, resolution), dtype=np.uint8)
    shards, key = [], 0
    given = {key: {"label": label} for key, label in enumerate(labels) if label is not None}
    for number, size in enumerate(sizes):
        with ShardWriter(root, number, resolution) as writer:
            for _ in range(size):
                writer.add(key, images[key].tobytes(), {"source": "noise", "path": f"{key}.png", **given.get(key, {})})
                key += 1
            info = writer.commit()
        assert info is not None
        shards.append(info)
    manifest = Manifest(FORMAT, resolution, {}, classes, {"seen": key}, tuple(shards))
    (root / MANIFEST).write_bytes(manifest.to_bytes())
    return images

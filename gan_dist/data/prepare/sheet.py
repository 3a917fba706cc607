"""A contact sheet: random samples of a dataset on one page, for a person to look at."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from gan_dist.data.shards import Manifest

_SIDE = 12
_GAP = 2


def contact_sheet(root: Path, manifest: Manifest, seed: str) -> bytes:
    """Returns a PNG of up to 144 samples of the shards in `root`, drawn by `seed` (hexadecimal)."""
    size, sizes = manifest.resolution, [shard.samples for shard in manifest.shards]
    side = min(_SIDE, max(1, 1536 // size))
    count = min(manifest.num_samples, side * side)
    # raw bits and a stable sort: numpy promises bit generators' streams for ever, not those of its distributions
    keys = np.random.Philox(int(seed[:16], 16)).random_raw(manifest.num_samples)
    chosen = np.sort(np.argsort(keys, kind="stable")[:count])
    starts = np.cumsum([0, *sizes])
    rows = -(-count // side)
    page = Image.new("RGB", (side * (size + _GAP) + _GAP, rows * (size + _GAP) + _GAP), (32, 32, 32))
    for place, sample in enumerate(chosen.tolist()):
        number = int(np.searchsorted(starts, sample, side="right")) - 1
        shard = manifest.shards[number]
        with (root / shard.file).open("rb") as stream:
            stream.seek(shard.data_offset + (sample - int(starts[number])) * shard.stride)
            pixels = np.frombuffer(stream.read(3 * size * size), np.uint8).reshape(3, size, size)
        row, column = divmod(place, side)
        page.paste(
            Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))),
            (_GAP + column * (size + _GAP), _GAP + row * (size + _GAP)),
        )
    out = io.BytesIO()
    page.save(out, "PNG")
    return out.getvalue()

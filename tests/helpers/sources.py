"""Folders of pictures as sources, and what a preparation of them left."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from gan_dist.data.prepare.account import Account


def encode(seed: int, size: tuple[int, int] = (90, 70), format: str = "PNG") -> bytes:
    """Returns an image file of smooth colours."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(stream, format)
    return stream.getvalue()


def fill(folder: Path, count: int = 10, broken: int = 0) -> Path:
    """Writes `count` images into two subfolders and `broken` files that are none, and returns the folder."""
    for i in range(count):
        path = folder / f"{'ab'[i % 2]}/{i:03d}.{'png' if i % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(i, format="PNG" if i % 3 else "JPEG"))
    for i in range(broken):
        (folder / f"broken{i}.jpg").write_text("<html>not found</html>")
    return folder


def contents(out: Path) -> dict[str, bytes]:
    """Returns every file of a dataset but the timings and the command."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name not in ("timings.json", "command.json"))
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def balanced(account: Account) -> bool:
    """Returns whether every entry is somewhere."""
    others = account.written + account.replaced + sum(account.rejected.values()) + sum(account.skipped.values())
    return account.complete and account.seen == others


def rejects(out: Path) -> dict[str, str]:
    """Returns the reason of every rejected path."""
    lines = (out / "rejects.jsonl").read_text().splitlines()
    return {record["path"]: record["reason"] for record in map(json.loads, lines)}

"""The account of a preparation: why images are rejected, how many went where, and a contact sheet of samples."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gan_dist.data.shards import Manifest
from gan_dist.utils.errors import GanDistError

REASONS = {
    "empty": "no bytes at all",
    "not_an_image": "the content is no image, whatever the name says",
    "unsupported": "an image format or mode that cannot be read here",
    "truncated": "the file ends before the picture is complete (--keep-truncated keeps it)",
    "corrupt": "the decoder reports damaged data",
    "too_large": "decoding would need more memory than a worker may take",
    "too_small": "the short edge is below --min-side",
    "unreadable": "the file could not be opened or read",
    "encrypted": "an encrypted archive member",
    "bad_archive": "the archive contradicts itself about this member",
    "decoder_crashed": "decoding it killed a worker process twice",
    "timed_out": "decoding it took too long",
}
"""Every reason in rejects.jsonl."""


class Rejected(Exception):
    """An image that cannot be used: a `reason` of REASONS, and free `detail` without memory addresses or times."""

    def __init__(self, reason: str, detail: str = "") -> None:
        detail = re.sub(r" at 0x[0-9a-fA-F]+", "", detail)
        super().__init__(reason, " ".join(detail.split())[:200])
        self.reason: str = self.args[0]
        self.detail: str = self.args[1]


_TOTALS: tuple[str, ...] = ("seen", "written", "rejected", "replaced", "skipped", "duplicates", "classes", "unlabelled")
_TOTALS += ("ambiguous", "flags", "source_bytes")


@dataclass
class Account:
    """Where every source entry went: seen = written + rejected + replaced + skipped, once `complete`.

    `seen`: files in sources and replacements; `written`: samples; `rejected`: by reason; `replaced`: originals whose
    replacement was taken instead; `skipped`: by kind; `duplicates`: skipped files of equal content (with dedupe);
    `classes`: samples by class name; `unlabelled`, `ambiguous`: entries without a class, or with several; `flags`:
    samples by special treatment; `shards`, `shards_done`: in all, and finished; `source_bytes`: read for these;
    `notes`: lines for the user. The rest is about this run alone: `entries` and `read_bytes` handled in `seconds` by
    `workers`, seconds by `stages`, `peak_worker_bytes`.
    """

    out: str
    seen: int = 0
    written: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    replaced: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    unlabelled: int = 0
    ambiguous: int = 0
    flags: dict[str, int] = field(default_factory=dict)
    shards: int = 0
    shards_done: int = 0
    source_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    entries: int = 0
    read_bytes: int = 0
    seconds: float = 0.0
    workers: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    peak_worker_bytes: int = 0

    @property
    def complete(self) -> bool:
        """Whether every shard is finished, by this run or another."""
        return self.shards_done == self.shards

    @property
    def reject_fraction(self) -> float:
        """Rejected over rejected and written."""
        rejected = sum(self.rejected.values())
        return rejected / max(1, rejected + self.written)

    @property
    def images_per_second(self) -> float:
        """Entries a second in this run; 0 when it had nothing to do."""
        return self.entries / self.seconds if self.seconds else 0.0

    def totals(self) -> dict[str, Any]:
        """Returns the manifest's totals: no timings, and nothing that depends on who prepared, or when."""
        return {key: getattr(self, key) for key in _TOTALS}

    def timings(self) -> dict[str, Any]:
        """Returns the content of timings.json, about this run."""
        return {
            "images": self.entries,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images_per_second, 1),
            "mb_per_second": round(self.read_bytes / max(self.seconds, 1e-9) / 1e6, 2),
            "workers": self.workers,
            "stage_seconds": {stage: round(seconds, 3) for stage, seconds in self.stages.items()},
            "peak_worker_mib": round(self.peak_worker_bytes / 2**20, 1),
        }

    def rows(self) -> list[tuple[str, str]]:
        """Returns the summary table, a name and a text a row."""

        def by(counts: Mapping[str, int], limit: int = 12) -> str:
            largest = Counter(counts).most_common()
            text = ", ".join(f"{count:,} {name}" for name, count in largest[:limit])
            return text + (f", {len(largest) - limit} more" if len(largest) > limit else "")

        rows = [
            ("seen", f"{self.seen:,}"),
            ("written", f"{self.written:,}"),
            ("rejected", f"{sum(self.rejected.values()):,}" + (f": {by(self.rejected)}" if self.rejected else "")),
            ("replaced", f"{self.replaced:,}"),
            ("skipped", f"{sum(self.skipped.values()):,}" + (f": {by(self.skipped)}" if self.skipped else "")),
        ]
        if self.duplicates:
            rows.append(("duplicates", f"{self.duplicates:,}"))
        if self.classes:
            rows.append(("classes", f"{len(self.classes):,}: {by(self.classes, 5)}"))
            rows.append(("unlabelled", f"{self.unlabelled:,}, of them {self.ambiguous:,} ambiguous"))
        if self.flags:
            rows.append(("of these", by(self.flags)))
        rows.append(("shards", f"{self.shards_done:,} of {self.shards:,} done"))
        if self.entries:
            rate = f"{self.images_per_second:,.0f} images/s, {self.read_bytes / self.seconds / 1e6:,.1f} MB/s"
            rows.append(("speed", f"{rate} in {self.seconds:,.1f} s with {self.workers} workers"))
        return rows

    def lines(self) -> list[str]:
        """Returns the table and the notes as plain text."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {value}" for name, value in rows] + self.notes


class TooManyRejects(GanDistError):
    """More images were rejected than allowed. Everything has been written except the manifest."""

    def __init__(self, message: str, account: Account) -> None:
        super().__init__(message)
        self.account = account


_SHEET_SIDE = 12
_SHEET_GAP = 2


def contact_sheet(root: Path, manifest: Manifest, seed: str) -> bytes:
    """Returns a PNG of up to 144 samples of the shards in `root`, chosen by `seed` (hexadecimal)."""
    size, sizes = manifest.resolution, [shard.samples for shard in manifest.shards]
    side = min(_SHEET_SIDE, max(1, 1536 // size))
    count = min(manifest.num_samples, side * side)
    # raw bits and a stable sort: numpy guarantees the streams of bit generators, not those of its distributions
    keys = np.random.Philox(int(seed[:16], 16)).random_raw(manifest.num_samples)
    chosen = np.sort(np.argsort(keys, kind="stable")[:count])
    starts = np.cumsum([0, *sizes])
    rows, cell = -(-count // side), size + _SHEET_GAP
    page = Image.new("RGB", (_SHEET_GAP + side * cell, _SHEET_GAP + rows * cell), (32, 32, 32))
    for place, sample in enumerate(chosen.tolist()):
        number = int(np.searchsorted(starts, sample, side="right")) - 1
        shard = manifest.shards[number]
        with (root / shard.file).open("rb") as stream:
            stream.seek(shard.data_offset + (sample - int(starts[number])) * shard.stride)
            pixels = np.frombuffer(stream.read(3 * size * size), np.uint8).reshape(3, size, size)
        row, column = divmod(place, side)
        page.paste(
            Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))),
            (_SHEET_GAP + column * cell, _SHEET_GAP + row * cell),
        )
    out = io.BytesIO()
    page.save(out, "PNG")
    return out.getvalue()

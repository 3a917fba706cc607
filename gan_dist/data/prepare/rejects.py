"""Why an image is not in the dataset: a small fixed vocabulary."""

from __future__ import annotations

import re

REASONS = {
    "empty": "no bytes at all",
    "not_an_image": "the content is of no image format, whatever the name says",
    "unsupported": "an image format or mode that cannot be read here",
    "truncated": "the data end before the picture does (--keep-truncated keeps it)",
    "corrupt": "the decoder found the data broken",
    "too_large": "decoding would need more memory than a worker may take",
    "too_small": "the short edge is below --min-side",
    "unreadable": "the file could not be opened or read",
    "encrypted": "an encrypted archive member",
    "bad_archive": "the archive contradicts itself about this member",
    "decoder_crashed": "decoding it killed a worker process, twice",
    "timed_out": "decoding it took longer than a worker may",
}
"""The whole vocabulary of rejects.jsonl."""


class Rejected(Exception):
    """An image that cannot be used: a reason of `REASONS` and free detail without addresses or times."""

    def __init__(self, reason: str, detail: str = "") -> None:
        detail = re.sub(r" at 0x[0-9a-fA-F]+", "", detail)
        super().__init__(reason, " ".join(detail.split())[:200])
        self.reason: str = self.args[0]
        self.detail: str = self.args[1]

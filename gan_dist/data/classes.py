"""The classes of a dataset: those that a conditional game knows, and the class of each sample.

Class 0 is that of images without a label; images of classes too small to learn from count as such.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gan_dist.data.dataset import Dataset
from gan_dist.data.shards import check_classes
from gan_dist.utils.errors import UserError

UNLABELLED = "unlabelled"
"""What class 0 is called, unless the dataset has a class of that name."""
_SHOWN = 5


@dataclass(frozen=True)
class Classes:
    """What a generator may be asked for; nothing, by default.

    `names`: of classes 1 to K, in the dataset's order; `images`: how many images each class has there, [K + 1],
    beginning with the unlabelled ones.
    """

    names: tuple[str, ...] = ()
    images: tuple[int, ...] = ()

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Classes:
        """Returns the classes that a checkpoint's state names, if any."""
        stored = state.get("classes") or {}
        return cls(tuple(stored.get("names", ())), tuple(stored.get("images", ())))

    def to_dict(self) -> dict[str, list[Any]]:
        """Returns plain values, for a checkpoint or JSON."""
        return {"names": list(self.names), "images": list(self.images)}

    @property
    def digest(self) -> str:
        """The sha256 of the names, shortened: the ranks of a run must have the same."""
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()[:12]

    def name(self, label: int) -> str:
        """Returns what class `label` is called."""
        return self.names[label - 1] if label else UNLABELLED

    def find(self, name: str, option: str = "--class") -> int:
        """Returns the class called `name`, however its letters' case. Raises UserError, which names the nearest."""
        if name in self.names:
            return 1 + self.names.index(name)
        folded = self._folded()
        if len(same := folded.get(_fold(name), [])) == 1:
            return 0 if same[0] not in self.names else 1 + self.names.index(same[0])
        close = same or [folded[key][0] for key in difflib.get_close_matches(_fold(name), folded, 3, 0.5)]
        known_as = f"there are {_some(self.names)} (of styles with model.classes_min_images images or more)"
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else known_as
        raise UserError(f"{option}: no class {name!r}; {hint}")

    def parse(self, text: str, option: str = "--classes") -> list[int]:
        """Returns the classes in a list with commas between them, which names may have in them, too."""
        words, found, known = text.split(","), list[int](), self._folded()
        while words:
            ends = (end for end in range(len(words), 1, -1) if _fold(",".join(words[:end])) in known)
            end = next(ends, 1)
            found.append(self.find(",".join(words[:end]).strip(), option))
            words = words[end:]
        return found

    def _folded(self) -> dict[str, list[str]]:
        """Returns the names, "unlabelled" among them, by what they have in common however they are written."""
        folded: dict[str, list[str]] = {}
        for known in (*self.names, *(() if UNLABELLED in self.names else (UNLABELLED,))):
            folded.setdefault(_fold(known), []).append(known)
        return folded

    def draw(self, count: int, seed: int) -> Tensor:
        """Returns int64 [count]: classes as frequent as in the dataset, keyed by `seed`; independent of its latents."""
        source = torch.Generator().manual_seed((seed + 0x5EED_C1A5) % 2**63)
        weights = torch.tensor(self.images, dtype=torch.float64)
        return torch.multinomial(weights, count, replacement=True, generator=source)

    def largest(self, count: int) -> list[int]:
        """Returns the classes with the most images, at most `count`, in the order of the dataset."""
        return sorted(sorted(range(1, 1 + len(self.names)), key=lambda label: -self.images[label])[:count])

    def unlike(self, other: Classes) -> str | None:
        """Returns in which names they differ, in one clause, or None where they are the same in the same order."""
        if self.names == other.names:
            return None
        gone, new = (
            [name for name in a if name not in b] for a, b in ((self.names, other.names), (other.names, self.names))
        )
        parts = [f"{word} {_some(names)}" for word, names in (("only there:", gone), ("only here:", new)) if names]
        return f"{len(self.names)} classes there and {len(other.names)} here ({'; '.join(parts) or 'in another order'})"


NO_CLASSES = Classes()


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().casefold()


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns [N, num_classes + 1], a 1 in the column of each of `labels`, int64 [N].

    A comparison waits for no device, and its product with a table has a gradient whose sums keep their order, where
    that of a gather adds up in any order.
    """
    return (labels[:, None] == torch.arange(num_classes + 1, device=labels.device)).to(dtype)


def choose_classes(dataset: Dataset, min_images: int) -> Classes:
    """Returns the classes of `dataset` that have `min_images` images or more.

    Raises UserError where there are none.
    """
    known, counts = dataset.manifest.classes, dataset.manifest.class_counts
    if counts is None:
        found = np.concatenate([dataset.labels(shard) for shard in range(len(dataset.shard_sizes))])
        counts = np.bincount(found[found >= 0], minlength=len(known)).tolist()
    check_classes(known, counts, min_images, str(dataset.root))
    kept = {name: count for name, count in zip(known, counts, strict=True) if count >= max(1, min_images)}
    return Classes(tuple(kept), (dataset.num_samples - sum(kept.values()), *kept.values()))


class Labels:
    """The class of each sample of a dataset, read from its shard's sidecar at first use."""

    def __init__(self, dataset: Dataset, classes: Classes) -> None:
        """Labels are matched by name: a class of the dataset that `classes` does not have is 0."""
        numbers = {name: label for label, name in enumerate(classes.names, start=1)}
        self._class_of = np.array([*(numbers.get(name, 0) for name in dataset.manifest.classes), 0], np.int64)
        self.classes = classes
        self._dataset = dataset
        self._starts = np.concatenate([[0], np.cumsum(dataset.shard_sizes)])
        self._classes = np.full(dataset.num_samples, -1, np.int64)

    @classmethod
    def choose(cls, dataset: Dataset, min_images: int, at_once: bool) -> Labels:
        """Returns the labels of the classes of `dataset` that have `min_images` images or more, all of them read if
        they are wanted `at_once`. Raises UserError where there are none, or a sidecar is damaged."""
        labels = cls(dataset, choose_classes(dataset, min_images))
        for shard in range(len(dataset.shard_sizes)) if at_once else ():
            labels.load(shard)
        return labels

    def load(self, shard: int) -> None:
        """Reads the labels of a shard, unless that has been done. Raises UserError where its sidecar is damaged."""
        part = slice(self._starts[shard], self._starts[shard + 1])
        if self._classes[part.start] < 0:
            self._classes[part] = self._class_of[self._dataset.labels(shard)]  # the last stands for no label, -1

    def of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the classes of `samples`, int64 [n]."""
        classes = self._classes[samples]
        if classes.min(initial=0) < 0:
            for shard in set(np.searchsorted(self._starts, samples, side="right") - 1):
                self.load(int(shard))
            classes = self._classes[samples]
        return classes

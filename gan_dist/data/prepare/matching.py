"""Which of two lists of paths mean the same file, although they are spelt differently.

A path has many spellings: backslashes, folders more or less on top, composed and decomposed accents, another case, no
ending. Two paths match when they share the longest end, part by part, and neither has an equally good partner besides.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from gan_dist.data.prepare.sources import IMAGE_ENDINGS

_MOST = 64
"""Candidates of which the better spelt are preferred; among more, none is."""


_SAME_ENDINGS = {".jpeg": ".jpg", ".jpe": ".jpg", ".jfif": ".jpg", ".tiff": ".tif"}


@dataclass
class Matches:
    """`keys`: for each target the key that means it, or None; `ambiguous_targets`, `ambiguous_keys`: those with
    several equally good partners."""

    keys: list[int | None]
    ambiguous_targets: set[int] = field(default_factory=set)
    ambiguous_keys: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Path:
    parts: tuple[str, ...]
    """As they are spelt, normalised, the last first and without its ending."""
    ending: str

    @property
    def kind(self) -> str:
        """The ending, however it is spelt."""
        return _SAME_ENDINGS.get(self.ending.lower(), self.ending.lower())

    def ends(self) -> list[str]:
        """Returns the path's ends in one case, the shortest first."""
        ends = [self.parts[0].casefold()]
        for part in self.parts[1:]:
            ends.append(f"{ends[-1]}/{part.casefold()}")
        return ends


def _path(text: str) -> _Path:
    parts = PurePosixPath(unicodedata.normalize("NFC", text).replace("\\", "/")).parts
    *folders, name = [part for part in parts if part not in ("/", ".", "..")] or [""]
    ending = PurePosixPath(name).suffix
    if ending.lower() in IMAGE_ENDINGS:
        return _Path((name.removesuffix(ending), *reversed(folders)), ending)
    return _Path((name, *reversed(folders)), "")


def name_of(text: str) -> str:
    """Returns a path's last part without its ending and in one case: paths that match have it in common."""
    return _path(text).parts[0].casefold()


def _fit(one: _Path, other: _Path) -> tuple[bool, int] | None:
    """Returns how well two paths with a common end fit: equal endings, and parts in the same case. None: another
    ending."""
    if one.ending and other.ending and one.kind != other.kind:
        return None
    alike = sum(a == b for a, b in zip(one.parts, other.parts, strict=False))
    return one.kind == other.kind, alike + (one.ending == other.ending)


class _Side:
    """One of the lists: its paths, and which of them have a given end."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.paths = [_path(text) for text in texts]
        self.by_end: dict[str, list[int]] = {}
        for number, path in enumerate(self.paths):
            for end in path.ends():
                self.by_end.setdefault(end, []).append(number)

    def best(self, path: _Path) -> list[int]:
        """Returns the paths of this side that share the longest end with `path`, of these the best spelt."""
        for end in reversed(path.ends()):
            found = self.by_end.get(end, [])
            if len(found) > _MOST:
                return found
            fits = {number: fit for number in found if (fit := _fit(path, self.paths[number])) is not None}
            if fits:
                top = max(fits.values())
                return [number for number, fit in fits.items() if fit == top]
        return []


def match(
    keys: Sequence[str],
    targets: Sequence[str],
    values: Sequence[Hashable] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Matches:
    """Returns which key means which target. Keys with equal `values` are as good as one another; `tick` is called for
    each path that is looked up."""
    key_side, target_side = _Side(keys), _Side(targets)
    worth: Sequence[Hashable] = range(len(keys)) if values is None else values
    result = Matches([None] * len(targets))
    wanted: dict[int, list[int]] = {}
    only: dict[int, list[int]] = {}  # by target the keys that want no other
    for number, path in enumerate(key_side.paths):
        tick()
        wanted[number] = target_side.best(path)
        if len(wanted[number]) > 1:
            result.ambiguous_keys.add(number)
        for target in wanted[number] if len(wanted[number]) == 1 else ():
            only.setdefault(target, []).append(number)
    many: dict[int, tuple[set[int], bool]] = {}  # the same long lists are found again and again
    for number, path in enumerate(target_side.paths):
        tick()
        found = key_side.best(path)
        if (known := many.get(id(found))) is None:
            known = set(found), len({worth[key] for key in found}) > 1
            if len(found) > _MOST:
                many[id(found)] = known
        among, is_choice = known
        mine = [key for key in only.get(number, ()) if key in among]
        if is_choice:
            result.ambiguous_targets.add(number)
            result.ambiguous_keys.update(mine)  # those that want several are there by now
        elif mine:
            result.keys[number] = mine[0]
        elif any(number in wanted[key][:_MOST] for key in found[:_MOST]):
            result.ambiguous_targets.add(number)
    return result

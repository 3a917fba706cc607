"""Class labels for entries: from a table, from folders, or from WebDataset's `.cls` members."""

from __future__ import annotations

import csv
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from gan_dist.data.prepare.matching import match, name_of
from gan_dist.data.prepare.sources import Entry, Source
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import expand

_MOST_DIGITS = 1000
"""Longer names are no numbers, even if all of them is digits: Python reads at most 4,300."""


@dataclass
class Labels:
    """The classes of the entries. `ids`: the class of each entry, or None; `classes`: the names; `counts`: unlabelled
    and ambiguous entries; `origin`: their source, for the recipe; `notes`: lines for the user."""

    ids: list[int | None]
    classes: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    origin: str | None = None
    notes: list[str] = field(default_factory=list)


def label(
    spec: str | None,
    entries: Sequence[Entry],
    sources: Sequence[Source],
    cls: Mapping[tuple[int, str], str],
    tick: Callable[[], None] = lambda: None,
) -> Labels:
    """Returns the labels that `spec` names: None (the `.cls` members, if any), `folders` (the name of a file's folder),
    or `CSV:FILECOL:LABELCOL`. `tick` is called for each path that is looked up.

    Raises:
        UserError: a table that cannot be read, has no such columns, or matches no entry.
    """
    ambiguous, notes = 0, []
    if spec is None:
        if not cls:
            return Labels([None] * len(entries))
        names: list[str | None] = [cls.get(entry.place) for entry in entries]
        origin = "cls"
    elif spec == "folders":
        names, origin = [_folders(entry)[-1] if _folders(entry) else None for entry in entries], spec
        if len(known := {name for name in names if name}) < 2:
            advice = _other_folders(entries, sources)
            if not known:
                raise UserError(f"--labels folders: no image is in a folder of its source: {advice}")
            one = f"every image that is in a folder is in one named {known.pop()!r}, so there is one class"
            notes.append(f"--labels folders: {one}: {advice}")
    else:
        table, origin = _read_table(spec, entries)
        names, ambiguous = _match(table, entries, sources, tick)
        if not any(names):
            problem = "no row matches any of the {} images: is the column right?"
            if ambiguous:
                problem = "of the {} images not one has a row of its own with one class: are the rows' paths whole?"
            row, image = next(iter(table), "(no row has both)"), entries[0].place[1]
            raise UserError(
                f"--labels {spec}: {problem.format(len(entries))} "
                f"The first row says {row!r}, the first image is {image!r}"
            )
    names = [name and unicodedata.normalize("NFC", name) for name in names]  # one class, however it is spelt
    known = {name for name in names if name}
    numeric = all(name.isdecimal() and len(name) < _MOST_DIGITS for name in known)
    classes = tuple(sorted(known, key=lambda name: (int(name), name)) if numeric else sorted(known))
    ids = {name: i for i, name in enumerate(classes)}
    labelled = [ids[name] if name else None for name in names]
    counts = {"unlabelled": labelled.count(None), "ambiguous": ambiguous}
    return Labels(labelled, classes, counts, origin, notes)


def _folders(entry: Entry) -> tuple[str, ...]:
    """Returns the names of the folders that an entry lies in, the nearest last."""
    return PurePosixPath(unicodedata.normalize("NFC", entry.place[1]).replace("\\", "/")).parts[:-1]


def _other_folders(entries: Sequence[Entry], sources: Sequence[Source]) -> str:
    """Returns what to do where no two images lie in folders of two names. A class is the nearest folder alone, and an
    archive is none: what gives the folders further up, or the sources themselves, as classes depends on them."""
    used = [sources[number] for number in dict.fromkeys(entry.place[0] for entry in entries)]
    unpacked = all(source.kind == "folder" for source in used)
    parents = ", ".join(sorted({str(Path(source.path).parent) for source in used}))
    paths = [(sources[entry.place[0]].path, *folders) for entry in entries if (folders := _folders(entry))]
    if not paths and unpacked:
        return f"give the parent folder as the source: {parents}"
    depth = (
        next((i for i in range(len(paths[0])) if len({path[: i + 1] for path in paths}) > 1), None) if paths else None
    )
    if depth is None or (depth == 0 and not unpacked):
        return (
            "the class is the folder that an image lies in directly: give a source with several, or a table of classes"
        )
    differ = ", ".join(sorted({path[depth] for path in paths if len(path) > depth})[:3])
    if depth == 0:
        return f"let the images lie directly in {differ}, and give the parent folder as the source: {parents}"
    where = "/".join(paths[0][:depth])
    return f"the folders that differ are {differ} in {where}: let the images lie in them directly"


@contextmanager
def _long_cells() -> Iterator[None]:
    """A context in which a table may have cells of any length."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_table(spec: str, entries: Sequence[Entry]) -> tuple[dict[str, set[str]], str]:
    """Returns the labels that a table gives to each path, and its description."""
    parts = spec.rsplit(":", 2)
    if len(parts) != 3 or not all(part.strip() for part in parts):
        raise UserError(
            f"--labels {spec}: expected `folders` or CSV:FILECOL:LABELCOL, as all_data_info.csv:new_filename:style"
        )
    path, file_column, label_column = expand(parts[0]), parts[1].strip(), parts[2].strip()
    table: dict[str, set[str]] = {}
    images: set[str] = set()
    line = 1
    try:
        with _long_cells(), path.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
            mark = _separator(stream.readline(), file_column, label_column)
            stream.seek(0)
            rows = csv.reader(stream, strict=True, delimiter=mark)
            columns = [name.strip() for name in next(rows, [])]
            if "\ufffd" in "".join(columns):
                raise UserError(f"--labels {spec}: {path} is not a table in UTF-8")
            places = [_column(spec, path, columns, name) for name in (file_column, label_column)]
            for row in rows:
                began, line = line + 1, rows.line_num
                if line > began:
                    images = images or {name_of(entry.place[1]) for entry in entries}
                    if _swallows_rows(row, len(columns), mark, places, images):
                        raise UserError(
                            f"--labels {spec}: {path} has a cell in line {began} that swallows whole rows: close its "
                            "quote, or write the cell in one line"
                        )
                if any(cell.strip() for cell in row[len(columns) :]):
                    raise UserError(
                        f"--labels {spec}: {path} has {len(row)} fields in line {line} and {len(columns)} in its head: "
                        f"put cells that have a {mark!r} in them into quotes"
                    )
                file, name = (row[place].strip() if place < len(row) else "" for place in places)
                if "\ufffd" in file + name:
                    raise UserError(f"--labels {spec}: {path} is not UTF-8 (line {line}): convert it")
                if file and name:
                    table.setdefault(file, set()).add(unicodedata.normalize("NFC", " ".join(name.split())))
    except OSError as error:
        raise UserError(f"--labels {spec}: {path} cannot be read: {error.strerror}") from None
    except csv.Error as error:
        what = f"a quote opened after line {line} is never closed" if "unexpected end" in str(error) else str(error)
        raise UserError(f"--labels {spec}: {path} is not a CSV file: {what} (from line {line + 1} on)") from None
    return table, f"{path.name}:{file_column}:{label_column}"


def _separator(first_line: str, *columns: str) -> str:
    """Returns what separates the columns of a table: the first of comma, semicolon, tab and bar by which its first line
    has these columns, else the comma."""
    for mark in ",;\t|":
        with suppress(csv.Error):
            if set(columns) <= {
                name.strip() for name in next(csv.reader([first_line], strict=True, delimiter=mark), [])
            }:
                return mark
    return ","


def _column(spec: str, path: Path, columns: Sequence[str], name: str) -> int:
    """Returns the place of a column. Raises UserError unless there is one of that name."""
    if (count := columns.count(name)) == 1:
        return columns.index(name)
    if count:
        raise UserError(
            f"--labels {spec}: {path} has the column {name!r} {'twice' if count == 2 else f'{count} times'}"
        )
    there = ", ".join(" ".join(column.split()) for column in columns) or "none"
    raise UserError(f"--labels {spec}: no column {name!r} in {path}; it has {there}")


def _swallows_rows(row: Sequence[str], columns: int, mark: str, places: Sequence[int], images: set[str]) -> bool:
    """Returns whether a cell of several lines holds other rows: a quote was not closed, and another one closed it.

    A description may look like rows. It is taken for some if one of them names an image; a path or a class (at
    `places`) is if all of its lines could be rows.
    """
    for place, cell in enumerate(row):
        lines = [line.split(mark) for line in cell.splitlines()]
        if len(lines) < 2:
            continue
        # the cell's own row begins in its first line and ends in its last one
        lines[0] = [""] * place + lines[0]
        lines[-1] += [""] * (len(row) - place - 1)
        whole = [line for line in lines if len(line) >= columns]
        if any(name_of(line[places[0]].strip()) in images for line in whole):
            return True
        if place in places and len(whole) == len(lines):
            return True
    return False


def _match(
    table: Mapping[str, set[str]], entries: Sequence[Entry], sources: Sequence[Source], tick: Callable[[], None]
) -> tuple[list[str | None], int]:
    """Returns the label of each entry, and the number of entries whose label is ambiguous."""
    files, labels = list(table), [frozenset(names) for names in table.values()]
    targets = [f"{sources[entry.place[0]].stem}/{entry.place[1]}" for entry in entries]
    matches = match(files, targets, labels, tick)
    names: list[str | None] = []
    ambiguous = len(matches.ambiguous_targets)
    for key in matches.keys:
        names.append(next(iter(labels[key])) if key is not None and len(labels[key]) == 1 else None)
        ambiguous += key is not None and len(labels[key]) > 1
    return names, ambiguous

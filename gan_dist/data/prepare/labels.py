"""Class labels for entries: from a table, from folders, or from WebDataset's `.cls` members."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from gan_dist.data.prepare.sources import Entry, Source
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import expand


@dataclass
class Labels:
    """The classes of the entries. `ids`: the class of each entry, or None; `classes`: the names; `counts`: unlabelled
    and ambiguous entries; `origin`: their source, for the recipe."""

    ids: list[int | None]
    classes: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    origin: str | None = None


def label(
    spec: str | None, entries: Sequence[Entry], sources: Sequence[Source], cls: Mapping[tuple[int, str], str]
) -> Labels:
    """Returns the labels that `spec` names: None (the `.cls` members, if any), `folders` (the name of a file's folder),
    or `CSV:FILECOL:LABELCOL`.

    Raises:
        UserError: a table that cannot be read, has no such columns, or matches no entry.
    """
    ambiguous = 0
    if spec is None:
        if not cls:
            return Labels([None] * len(entries))
        names: list[str | None] = [cls.get(entry.place) for entry in entries]
        origin = "cls"
    elif spec == "folders":
        names = [PurePosixPath(entry.place[1]).parent.name or None for entry in entries]
        origin = spec
        if not any(names):
            raise UserError(
                "--labels folders: no image is in a folder of its source: give the parent folder as the source"
            )
    else:
        table, origin = _read_table(spec)
        names, ambiguous = _match(table, entries, sources)
        if not any(names):
            raise UserError(f"--labels {spec}: no row matches any of the {len(entries)} images: is the column right?")
    known = {name for name in names if name}
    numeric = all(name.isdecimal() for name in known)
    classes = tuple(sorted(known, key=int) if numeric else sorted(known))
    ids = {name: i for i, name in enumerate(classes)}
    labelled = [ids[name] if name else None for name in names]
    return Labels(labelled, classes, {"unlabelled": labelled.count(None), "ambiguous": ambiguous}, origin)


def _read_table(spec: str) -> tuple[dict[str, set[str]], str]:
    """Returns the labels that a table gives to each path, and its description."""
    parts = spec.rsplit(":", 2)
    if len(parts) != 3 or not all(parts):
        raise UserError(
            f"--labels {spec}: expected `folders` or CSV:FILECOL:LABELCOL, as all_data_info.csv:new_filename:style"
        )
    path, file_column, label_column = expand(parts[0]), parts[1], parts[2]
    table: dict[str, set[str]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
            rows = csv.DictReader(stream)
            columns = rows.fieldnames or []
            if "\ufffd" in "".join(columns):
                raise UserError(f"--labels {spec}: {path} is not a table in UTF-8")
            for column in (file_column, label_column):
                if column not in columns:
                    raise UserError(f"--labels {spec}: no column {column!r} in {path}; it has {', '.join(columns)}")
            for row in rows:
                file, name = (row.get(file_column) or "").strip(), " ".join((row.get(label_column) or "").split())
                if "\ufffd" in file + name:
                    raise UserError(f"--labels {spec}: {path} is not UTF-8 (line {rows.line_num}): convert it")
                if file and name:
                    table.setdefault(str(PurePosixPath(file.replace("\\", "/"))), set()).add(name)
    except OSError as error:
        raise UserError(f"--labels {spec}: {path} cannot be read: {error.strerror}") from None
    except csv.Error as error:
        raise UserError(f"--labels {spec}: {path} is not a CSV file: {error}") from None
    return table, f"{path.name}:{file_column}:{label_column}"


def _match(
    table: Mapping[str, set[str]], entries: Sequence[Entry], sources: Sequence[Source]
) -> tuple[list[str | None], int]:
    """Returns the label of each entry, and the number of entries whose label is ambiguous.

    Files match by relative path, with or without the source's name before it, or else by a file name that is unique.
    """
    rows = Counter(PurePosixPath(path).name for path in table)
    by_name = {PurePosixPath(path).name: labels for path, labels in table.items()}
    files = Counter(PurePosixPath(entry.place[1]).name for entry in entries)
    names: list[str | None] = []
    ambiguous = 0
    for entry in entries:
        source, path = entry.place[0], str(PurePosixPath(entry.place[1]))
        name = PurePosixPath(path).name
        labels = table.get(path) or table.get(f"{sources[source].stem}/{path}")
        if labels is None and name in by_name:
            labels = by_name[name] if rows[name] == 1 and files[name] == 1 else {"", "ambiguous"}
        ambiguous += labels is not None and len(labels) > 1
        names.append(next(iter(labels)) if labels and len(labels) == 1 else None)
    return names, ambiguous

"""The plan of a preparation, made before anything is decoded: which entries, in which order, by which recipe.

It is a pure function of sources and options. It is written into OUT/.prepare, and every later run or task on OUT must
arrive at the same one: so shard i is the same whoever writes it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import PIL
from PIL import features

from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.images import BACKGROUND, Recipe
from gan_dist.data.prepare.labels import label
from gan_dist.data.prepare.matching import match
from gan_dist.data.prepare.reading import Reader, SourceChanged, content_digest
from gan_dist.data.prepare.sources import Entry, Listing, Source, list_source, open_source
from gan_dist.data.shards import shard_name
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.files import clear_temporaries, read_record, write_atomically
from gan_dist.utils.locks import Locks
from gan_dist.utils.progress import Show, Ticks, silent

FOLDER = ".prepare"
"""The folder in OUT that keeps the plan and the records of finished shards."""


@dataclass(frozen=True)
class Options:
    """The options that change the dataset: image recipe, replacements, labels, dedupe, source entries a shard."""

    image: Recipe = field(default_factory=Recipe)
    replacements: str | None = None
    labels: str | None = None
    dedupe: bool = False
    shard_samples: int = 4096

    def non_defaults(self) -> dict[str, Any]:
        """Returns the options that differ from their defaults, under the names of `prepare`'s arguments."""
        values = {name: value for name, value in vars(self).items() if name != "image"} | vars(self.image)
        defaults = vars(Options()) | vars(Recipe())
        return {name: value for name, value in values.items() if value != defaults[name]}


@dataclass
class Plan:
    """`entries`: to be decoded; entry k has key k and goes to shard k // shard_samples. `ids`: its class, or None.
    `counts`: of the other files. `digest`: sha256 of the options, the entries and their classes; `accepted`: the
    digests that finished shards may have."""

    sources: list[Source]
    entries: list[Entry]
    ids: list[int | None]
    classes: tuple[str, ...]
    recipe: dict[str, Any]
    counts: dict[str, Any]
    duplicates: list[dict[str, str]]
    notes: list[str]
    image: Recipe
    shard_samples: int
    digest: str = ""
    accepted: frozenset[str] = frozenset()

    @property
    def num_shards(self) -> int:
        """The number of shards, including those that turn out empty."""
        return -(-len(self.entries) // self.shard_samples)

    def keys(self, shard: int) -> range:
        """Returns the keys of the entries of a shard."""
        return range(shard * self.shard_samples, min((shard + 1) * self.shard_samples, len(self.entries)))

    def describe(self, entry: Entry) -> dict[str, str]:
        """Returns the origin of an entry, for sidecars and rejects."""
        source, path = entry.place
        origin = {"source": self.sources[source].name, "path": path}
        if entry.stands_for:
            origin |= {"replaced_by": f"{self.sources[entry.source].name}/{entry.path}"}
        return origin


def make_plan(
    paths: Sequence[tuple[Path, str]],
    options: Options,
    out: Path,
    show: Show = silent,
    replacements: Sequence[tuple[Path, str]] = (),
) -> Plan:
    """Returns the plan for the sources at `paths`, and for `replacements`, each a path and a name. `show` is told a few
    times a second how many files were found, paths looked up and files compared; from another thread, so that it does
    not fall silent while one big directory is read.

    Raises:
        UserError: a source that is missing, damaged or without images; labels that do not fit.
    """
    # open the sources, the replacements last
    uses: Counter[str] = Counter()
    sources: list[Source] = []
    for path, name in (*paths, *replacements):
        uses[name] += 1
        sources.append(open_source(path, f"{name}#{uses[name]}" if uses[name] > 1 else name))
    _check_distinct(sources)
    for source in sources:
        if source.kind == "folder" and (out == Path(source.path) or out in Path(source.path).parents):
            raise UserError(f"source {source.path} is inside OUT ({out}): choose another folder for the dataset")
    # list their entries, settle replacements and duplicates
    with Ticks(show, "listing") as tick:
        listings = [list_source(source, number, exclude=out, tick=tick) for number, source in enumerate(sources)]
    skipped: Counter[str] = sum((listing.skipped for listing in listings), Counter())
    seen = sum(len(listing.entries) for listing in listings) + skipped.total()
    notes = [note for listing in listings for note in listing.notes]
    if replacements:
        with Ticks(show, "matching paths") as tick:
            entries, replaced = _replace(listings, len(replacements), sources, skipped, notes, tick)
    else:
        entries, replaced = [entry for listing in listings for entry in listing.entries], 0
    cls = {(i, path): name for i, listing in enumerate(listings) for path, name in listing.classes.items()}
    duplicates: list[dict[str, str]] = []
    if options.dedupe:
        told = label(options.labels, entries, sources, cls).ids
        with Ticks(show, "comparing files") as tick:
            entries, duplicates = _dedupe(entries, told, sources, tick)
        skipped["duplicate"] += len(duplicates)
    # label the entries, describe it all
    with Ticks(show if options.labels else silent, "matching paths") as tick:
        labels = label(options.labels, entries, sources, cls, tick)
    recipe = _of_image(options.image) | {
        "background": list(BACKGROUND),
        "shard_samples": options.shard_samples,
        "labels": labels.origin,
        "replacements": ", ".join(source.name for source in sources[len(paths) :]) or None,
        "dedupe": options.dedupe,
        "sources": [
            {
                "name": source.name,
                "kind": source.kind,
                "images": len(listing.entries),
                # without modification times: a copy of the same files makes the same dataset
                "digest": _digest(listing.entries, stamps=source.has_checksums),
            }
            for source, listing in zip(sources, listings, strict=True)
        ],
        "decoders": _decoders(),
    }
    counts = {"seen": seen, "replaced": replaced, "skipped": dict(sorted((+skipped).items())), "labels": labels.counts}
    notes += labels.notes
    if nested := skipped["nested archive"]:
        notes.append(
            f"{nested:,} archives inside the sources were not opened: name them as sources to include their images"
        )
    plan = Plan(
        sources,
        entries,
        labels.ids,
        labels.classes,
        recipe,
        counts,
        duplicates,
        notes,
        options.image,
        options.shard_samples,
    )
    options_alone = {key: value for key, value in recipe.items() if key not in ("sources", "decoders")}
    content = [options_alone, labels.classes, labels.ids, [(entry.source, entry.place) for entry in entries]]
    plan.digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    plan.accepted = frozenset({plan.digest})
    return plan


def _of_image(image: Recipe) -> dict[str, Any]:
    """Returns the recipe of images for the manifest. An option that was added later stands there only if it is used:
    datasets that were begun before it can be continued."""
    values = asdict(image)
    if not image.fast_checks:
        del values["fast_checks"]
    return values


def _check_distinct(sources: Sequence[Source]) -> None:
    """Raises UserError when a source is given twice, or a folder inside another: its images would be taken twice. (An
    archive inside a folder is no problem: it is not opened there.)"""
    known: set[Path] = set()
    places = [Path(os.path.realpath(source.path)) for source in sources]
    for place, source in zip(places, sources, strict=True):
        if place in known:
            raise UserError(f"source {source.path} is given twice: its images would be taken twice")
        known.add(place)
    for place, source in zip(places, sources, strict=True):
        if source.kind == "folder" and (outer := known.intersection(place.parents)):
            raise UserError(f"source {source.path} is inside the source {outer.pop()}: its images would be taken twice")


def _decoders() -> dict[str, str]:
    """Returns the versions of the decoders, on which pixels may depend."""
    versions = {"pillow": PIL.__version__}
    for name in ("libjpeg_turbo", "jpg_2000", "libtiff", "webp", "avif", "littlecms2"):
        if version := features.version(name):
            versions[name] = version
    versions["simplejpeg"] = metadata.version("simplejpeg")
    return versions


def _digest(entries: Sequence[Entry], stamps: bool = True) -> str:
    lines = (f"{entry.path}\0{entry.size}\0{entry.stamp if stamps else ''}\n" for entry in entries)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _replace(
    listings: Sequence[Listing],
    number: int,
    sources: Sequence[Source],
    skipped: Counter[str],
    notes: list[str],
    tick: Callable[[], None],
) -> tuple[list[Entry], int]:
    """Returns the entries, with originals replaced by entries of the last `number` listings, and how many were.

    A replacement is matched to its original by path (`train/1.jpg` in the zip replaces `1.jpg` of the source `train`);
    where that leaves a choice, nothing is replaced. Replacements that are not used are counted in `skipped`.
    """
    entries, new = (
        [entry for listing in part for entry in listing.entries] for part in (listings[:-number], listings[-number:])
    )
    targets = [_place(entry, sources) for entry in entries]
    matches = match([_place(entry, sources) for entry in new], targets, tick=tick)
    used = {key for key in matches.keys if key is not None}
    for key in range(len(new)):
        if key not in used:
            skipped["ambiguous replacement" if key in matches.ambiguous_keys else "replacement of nothing"] += 1
    if not used and entries:
        first = f"the first is {new[0].path!r}, the first image {entries[0].path!r}"
        notes.append(f"no replacement has the path of an image: {first}")
    taken = [
        entry if key is None else replace(new[key], stands_for=entry.place)
        for entry, key in zip(entries, matches.keys, strict=True)
    ]
    return taken, len(used)


def _place(entry: Entry, sources: Sequence[Source]) -> str:
    return f"{sources[entry.source].stem}/{entry.path}"


def _dedupe(
    entries: list[Entry], told: Sequence[int | None], sources: Sequence[Source], tick: Callable[[], None]
) -> tuple[list[Entry], list[dict[str, str]]]:
    """Returns the entries without copies of equal content, and a record of each copy. The first that has a class, by
    `told`, is kept, or else the first. Only files of equal size (in zips, of equal size and checksum) are read."""
    groups: dict[tuple[int, str], list[int]] = {}
    zipped = all(sources[entry.source].has_checksums for entry in entries)
    for index, entry in enumerate(entries):
        if entry.size and not entry.fault:
            groups.setdefault((entry.size, entry.stamp if zipped else ""), []).append(index)

    def first_of_each(group: list[int]) -> list[tuple[int, int]]:
        reader, known = Reader(sources), dict[bytes, list[int]]()
        for index in group:
            tick()
            try:
                content = hashlib.sha256(reader.read(entries[index])).digest()
            except (Rejected, SourceChanged):
                continue  # decoding it will fail too, and be recorded
            known.setdefault(content, []).append(index)
        reader.close()
        copies = []
        for equal in known.values():
            kept = next((index for index in equal if told[index] is not None), equal[0])
            copies += [(index, kept) for index in equal if index != kept]
        return copies

    with ThreadPoolExecutor(4) as pool:
        same = dict(
            pair for part in pool.map(first_of_each, (g for g in groups.values() if len(g) > 1)) for pair in part
        )

    def name(index: int) -> str:
        source, path = entries[index].place
        return f"{sources[source].name}/{path}"

    left_out = [{"duplicate": name(index), "of": name(same[index])} for index in sorted(same)]
    return [entry for index, entry in enumerate(entries) if index not in same], left_out


def claim(out: Path) -> Locks:
    """Returns the locks of `out`, having made the folder where it was missing.

    Raises:
        UserError: `out` is not writable, or holds other files.
    """
    folder = out / FOLDER
    try:
        if out.is_dir() and not folder.exists() and any(out.iterdir()):
            raise UserError(f"{out} holds other files: OUT must be a new or empty folder, or one that prepare began")
        folder.mkdir(parents=True, exist_ok=True)
        return Locks(folder / "lock")
    except OSError as error:
        raise UserError(f"cannot write to OUT {out}: {error.strerror}") from None


def settle(plan: Plan, out: Path, show: Show = silent) -> None:
    """Writes the plan into `out`, or checks that it makes what the one there makes, and takes that one's account of
    sources and decoders over. What only looks different becomes a note.

    Raises:
        UserError: `out` holds a dataset of another recipe.
        GanDistError: a source changed since the preparation began.
    """
    folder = out / FOLDER
    for name in ("plan.json", "entries.jsonl.gz"):
        clear_temporaries(folder / name)
    if (folder / "plan.json").exists():
        try:
            stored = json.loads((folder / "plan.json").read_bytes())
            lines = gzip.decompress((folder / "entries.jsonl.gz").read_bytes()).splitlines()
            before = {(source, path): (size, stamp) for source, path, size, stamp in map(json.loads, lines)}
            with Ticks(show, "comparing files") as tick:
                _continue(plan, stored, before, out, tick)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zlib.error) as error:
            raise UserError(f"{folder} is damaged ({error}): remove {out} and prepare again") from None
        return
    entries = (json.dumps([*entry.place, entry.size, entry.stamp]) for entry in plan.entries)
    write_atomically(folder / "entries.jsonl.gz", gzip.compress("\n".join(entries).encode(), compresslevel=3, mtime=0))
    stored = {"digest": plan.digest, "recipe": plan.recipe, "counts": plan.counts, "classes": plan.classes}
    stored["labels"] = _labels_digest(plan)
    write_atomically(folder / "plan.json", json.dumps(stored, indent=1).encode())


def _labels_digest(plan: Plan) -> str:
    return hashlib.sha256(json.dumps([plan.classes, plan.ids]).encode()).hexdigest()


def _continue(
    plan: Plan,
    stored: dict[str, Any],
    before: dict[tuple[int, str], tuple[int, str]],
    out: Path,
    tick: Callable[[], None],
) -> None:
    """Takes over what the stored plan says of the sources, unless the new one would make something else."""
    _compare_recipes(plan, stored["recipe"], out)
    after = {entry.place: entry for entry in plan.entries}
    other = [
        place
        for place, entry in after.items()
        if before.get(place, (entry.size, entry.stamp)) != (entry.size, entry.stamp)
    ]
    # a zip's stamp is a checksum, and what has another size has another content
    changed = [
        place
        for place in other
        if after[place].size != before[place][0] or plan.sources[after[place].source].has_checksums
    ]
    touched = set(other) - set(changed)
    plan.accepted = frozenset({plan.digest, stored["digest"]})
    changed += _rewritten(plan, touched, list(before), out, tick)
    changes = {
        "added": [place for place in after if place not in before],
        "removed": [place for place in before if place not in after],
        "changed": changed,
    }
    summary = [
        f"{len(places)} {how} (first {plan.sources[places[0][0]].name}/{places[0][1]!r})"
        for how, places in changes.items()
        if places
    ]
    if not summary and stored.get("labels", "") not in ("", _labels_digest(plan)):
        summary = ["labels"]
    if not summary and list(stored["classes"]) != list(plan.classes):
        summary = ["classes"]
    if summary or list(before) != list(after):
        raise GanDistError(
            f"the sources changed since {out} was begun: {', '.join(summary) or 'their order'}: restore them, "
            "or prepare into another OUT"
        )
    if touched:
        plan.notes.append(
            f"{len(touched):,} files, or their archives, have other modification times than when {out} was begun: "
            "those that were prepared by then were compared"
        )
    if stored["counts"] != plan.counts:
        plan.notes.append("files beside the images came or went: they are counted as when the dataset was begun")
    if (then := stored["recipe"].get("decoders")) != plan.recipe["decoders"]:
        now = plan.recipe["decoders"]
        news = [
            f"{name} {then.get(name)} is now {now.get(name)}"
            for name in {**then, **now}
            if then.get(name) != now.get(name)
        ]
        plan.notes.append(f"begun with other decoders ({', '.join(news)}): shards made from now on may differ a little")
    plan.digest, plan.recipe, plan.counts = stored["digest"], stored["recipe"], stored["counts"]


def _compare_recipes(plan: Plan, recipe: dict[str, Any], out: Path) -> None:
    """Raises UserError for an option, or the name of a source, that differs."""
    differences = [
        f"{key} was {recipe.get(key)!r} and is now {plan.recipe[key]!r}"
        for key in plan.recipe
        if key not in ("sources", "decoders") and plan.recipe[key] != recipe.get(key)
    ]
    names = [[source["name"] for source in sources] for sources in (recipe["sources"], plan.recipe["sources"])]
    if names[0] != names[1]:
        differences.append(f"the sources were {', '.join(names[0])} and are now {', '.join(names[1])}")
    if differences:
        raise UserError(
            f"{out} holds a dataset of another recipe: {'; '.join(differences)}: use the same options, or another OUT"
        )


def _rewritten(
    plan: Plan, touched: set[tuple[int, str]], before: Sequence[tuple[int, str]], out: Path, tick: Callable[[], None]
) -> list[tuple[int, str]]:
    """Returns those of the `touched` files that are in finished shards and whose content is not what went there.

    `before` has the places of the entries by the keys that they had then: a file that came or went since has moved the
    keys of all that follow it.
    """
    if not touched:
        return []
    entries = {entry.place: entry for entry in plan.entries if entry.place in touched}
    changed = []
    with closing(Reader(plan.sources)) as reader:
        for shard, start in enumerate(range(0, len(before), plan.shard_samples)):
            part = read_record(out / FOLDER / f"{shard_name(shard)}.json")
            if part is None or part["plan"] not in plan.accepted:
                continue
            places = before[start : start + plan.shard_samples]
            contents = part.get("contents") or [""] * len(places)
            for place, content in zip(places, contents, strict=True):
                tick()
                if place in touched and _content(reader, entries[place]) != content:
                    changed.append(place)
    return changed


def _content(reader: Reader, entry: Entry) -> str:
    try:
        return content_digest(reader.read(entry))
    except Rejected:
        return ""

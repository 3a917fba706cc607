"""Sources -> a dataset: planned, decoded in parallel, written shard by shard, restartable, all accounted for."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from gan_dist.data.prepare import avif, libtiff, webp
from gan_dist.data.prepare.account import Account, TooManyRejects, contact_sheet
from gan_dist.data.prepare.images import RESAMPLE, Recipe
from gan_dist.data.prepare.plan import FOLDER, Options, Plan, claim, make_plan, settle
from gan_dist.data.prepare.staging import needs_staging, source_name, spread, stage
from gan_dist.data.prepare.verify import store_command, stored_command, verify, was_made_by
from gan_dist.data.prepare.workers import Done, make_jobs, run_jobs
from gan_dist.data.remote.fetch import masked
from gan_dist.data.shards import FORMAT, MANIFEST, Manifest, ShardInfo, ShardWriter, read_manifest, shard_name
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.files import (
    clear_temporaries,
    expand,
    expand_directory,
    is_address,
    present,
    read_record,
    write_atomically,
    write_record,
)
from gan_dist.utils.locks import Locks
from gan_dist.utils.progress import Show, Ticks, silent
from gan_dist.utils.system import default_workers

REJECTS, DUPLICATES, TIMINGS, SHEET = "rejects.jsonl", "duplicates.jsonl", "timings.json", "contact_sheet.png"
STAGED = "staged"
_PLAN_LOCK, _FINISH_LOCK, _STAGE_LOCK = 2**30, 2**30 + 1, 2**30 + 2
_NO_LOCKS = "this file system has no locks: make sure that no two runs prepare the same part at once"
_FAST = "--fast-checks: AVIFs and deflated strips of TIFFs were not checked for damage"
_UNHEARD = "Pillow's {} cannot be called here: damage of {}s was looked for in part only"
_NOT_ALL = "the dataset is complete when all shards are done: by the other tasks, or by this command without --task"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Part = dict[str, Any]


def prepare(
    sources: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    resolution: int = 64,
    resample: str = "lanczos",
    replacements: str | Path | None = None,
    labels: str | None = None,
    workers: int | None = None,
    task: tuple[int, int] | None = None,
    dedupe: bool = False,
    max_reject_fraction: float = 0.05,
    shard_samples: int = 4096,
    min_side: int = 1,
    keep_truncated: bool = False,
    full_decode: bool = False,
    fast_checks: bool = False,
    show: Show = silent,
    log: Callable[[str], None] = lambda line: None,
) -> Account:
    """Returns the account of preparing `sources` into the dataset `out`.

    A source is a folder, a zip, a tar (such as a WebDataset shard), a brace pattern of these, or the address of a tar
    that webdataset's gopen can open (`http://`, `gs://`, `pipe:`, ...).

    Run again after an interruption, it continues; run again on a complete dataset, it rewrites shards that are missing
    or damaged, and nothing else. `task` (i, n) does every n-th shard from i on; the task that ends last writes the
    manifest. `workers`: processes (default: one a CPU; 0: in this process). `show` is told how far fetching, listing,
    matching, comparing and preparing have come, `log` of what is tried again. The other options are those of `gan-dist
    prepare`; `replacements` may be whatever a source may be.

    Raises:
        UserError: bad options, sources or `out`, or not one readable image. Nothing partial is left.
        TooManyRejects: more than `max_reject_fraction` rejected; everything but the manifest is written.
        GanDistError: a source changed, the disk is full, another process is writing the same shards.
    """
    began = perf_counter()
    # check the arguments
    recipe = Recipe(resolution, resample, min_side, keep_truncated, full_decode, fast_checks)
    if replacements and not is_address(str(replacements)):
        replacements = expand(replacements)
    more = spread([replacements]) if replacements else []
    options = Options(recipe, str(replacements) if replacements else None, _absolute(labels), dedupe, shard_samples)
    processes = default_workers() if workers is None else workers
    _check(options, task, processes, max_reject_fraction)
    target = expand_directory(out)
    texts = spread([sources] if isinstance(sources, str | Path) else sources)
    if not texts:
        raise UserError("no source given: expected folders, zips or tars")
    created = not present(target)
    _check_target(target)
    arguments = {**options.non_defaults(), "max_reject_fraction": max_reject_fraction}
    every = [*texts, *more]
    staged, inputs = any(map(needs_staging, every)), _inputs(every, options.labels)
    if staged and inputs is not None and was_made_by(target, texts, arguments, inputs) and (done := _finished(target)):
        return done
    try:
        with write_failure(target), ExitStack() as stack:
            # plan
            locks = stack.enter_context(closing(claim(target))) if staged else None
            paths, notes = _local(every, target, locks, show, log)
            try:
                plan = make_plan(paths[: len(texts)], options, target, show, paths[len(texts) :])
            except UserError as error:
                raise _with_addresses(error, every, paths) from None
            plan.notes += notes
            locks = locks or stack.enter_context(closing(claim(target)))
            with locks.hold(_PLAN_LOCK):
                with _copies_dropped(target):
                    settle(plan, target, show)
                if present(target / MANIFEST) and (before := stored_command(target)):  # accepted with that limit
                    limit = before[1].get("max_reject_fraction", max_reject_fraction)
                    arguments["max_reject_fraction"] = max(max_reject_fraction, limit)
                store_command(target, texts, arguments, inputs)
            # work, and finish once all shards are done
            run = _Run(plan, target, locks, show)
            first, step = task or (0, 1)
            run.work(range(first, plan.num_shards, step), processes)
            account = run.account(perf_counter() - began)
            if account.complete:
                run.finish(account, max_reject_fraction)
                account.notes = [note for note in account.notes if note not in notes]  # the copies are gone
    except UserError:
        if created and not present(target / FOLDER / "plan.json"):
            shutil.rmtree(target, ignore_errors=True)
        raise
    except _NothingLeft as nothing:
        shutil.rmtree(target if created else target / FOLDER, ignore_errors=True)
        raise UserError(str(nothing)) from None
    return account


@contextmanager
def _copies_dropped(out: Path) -> Iterator[None]:
    """A context that, where a complete dataset is not gone on with, removes the copies of its sources."""
    try:
        yield
    except GanDistError:
        if present(out / MANIFEST):
            shutil.rmtree(out / FOLDER / STAGED, ignore_errors=True)
        raise


def _local(
    texts: Sequence[str], out: Path, locks: Locks | None, show: Show, log: Callable[[str], None]
) -> tuple[list[tuple[Path, str]], list[str]]:
    """Returns the path and name of each source, and notes. One process stages those that need it, the others wait."""
    paths, early, began = [], list[tuple[float, str]](), time.time()
    folder = out / FOLDER / STAGED
    if locks and not locks.missing:
        with locks.hold(_STAGE_LOCK):  # so that whoever was fetching has ended
            for leftover in folder.glob("*.tmp"):
                leftover.unlink(missing_ok=True)
    for text in texts:
        path = Path(text)
        if locks and needs_staging(text):
            with locks.hold(_STAGE_LOCK), Ticks(show, "fetching and unpacking, MB", 10**6) as tick:
                path = stage(text, folder, tick, log)
            if is_address(text) and (fetched := path.stat().st_ctime) < began:
                early.append((fetched, text))
        paths.append((path, source_name(text)))
    if not early:
        return paths, []
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(min(early)[0]))
    what = f"{len(early):,} addresses are as they were fetched from {when} on (first {masked(early[0][1])})"
    return paths, [f"{what}: remove {folder} to fetch them again"]


def _with_addresses(error: UserError, texts: Sequence[str], paths: Sequence[tuple[Path, str]]) -> UserError:
    """Returns the error with addresses in place of staged copies; those copies are removed, to be fetched again."""
    message = str(error)
    for text, (path, _) in zip(texts, paths, strict=True):
        if path.parent.name == STAGED and path.parent.parent.name == FOLDER and str(path) in message:
            path.unlink(missing_ok=True)
            message = message.replace(str(path), masked(text))
    return UserError(message)


def _inputs(texts: Sequence[str], labels: str | None) -> dict[str, list[int]] | None:
    """Returns size and modification time of each local file that the dataset is made of; None if one is a folder, in
    which files may change unseen, or cannot be looked at."""
    table = [labels.rsplit(":", 2)[0]] if labels and labels.count(":") >= 2 else []
    found = {}
    for text in (*texts, *table):
        if not is_address(text):
            try:
                status = Path(text).stat()
            except OSError:
                return None
            if stat.S_ISDIR(status.st_mode):
                return None
            found[text] = [status.st_size, status.st_mtime_ns]
    return found


def _finished(out: Path) -> Account | None:
    """Returns the account of a dataset that is complete and sound, so that nothing is fetched again; else None."""
    try:
        if verify(out):
            return None
        manifest = read_manifest(out)
        shards = len(manifest.shards)
        return Account(str(out), **manifest.totals, shards=shards, shards_done=shards)
    except (UserError, TypeError):  # no manifest, a damaged one, or the totals of another release
        return None


class _NothingLeft(Exception):
    """Every image was rejected."""


def _check(options: Options, task: tuple[int, int] | None, processes: int, max_reject_fraction: float) -> None:
    """Raises UserError for an argument of `prepare` that is out of range."""
    if not 1 <= options.image.resolution <= 4096:
        raise UserError(f"resolution {options.image.resolution}: expected 1 to 4096")
    if options.image.resample not in RESAMPLE:
        raise UserError(f"resample {options.image.resample!r}: expected one of {', '.join(RESAMPLE)}")
    if options.shard_samples < 1:
        raise UserError(f"shard_samples {options.shard_samples}: expected at least 1")
    if task is not None and not 0 <= task[0] < task[1]:
        raise UserError(f"task {task[0]}/{task[1]}: expected i/n with 0 <= i < n")
    if processes < 0:
        raise UserError(f"workers {processes}: expected 0 or more")
    if not 0 <= max_reject_fraction <= 1:
        raise UserError(f"max_reject_fraction {max_reject_fraction}: expected 0 to 1")


def _absolute(labels: str | None) -> str | None:
    """Returns the label option with the path of its table absolute."""
    if labels and labels.count(":") >= 2:
        table, *last = labels.rsplit(":", 2)
        return ":".join([str(expand(table)), *last])
    return labels


def _check_target(out: Path) -> None:
    """Raises UserError unless `out` can become a dataset, before anything slow begins."""
    parent = out
    while not present(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"cannot write to OUT {out}: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to OUT {out}: no permission to write in {parent}")


@contextmanager
def write_failure(out: Path) -> Iterator[None]:
    """A context that turns a failed write (a full disk, ...) into a GanDistError that names `out`."""
    try:
        yield
    except BrokenPipeError:  # the reader of the output has gone
        raise
    except OSError as error:
        what = f"{out}: {error.strerror or error}"
        if error.errno in _NO_SPACE:
            raise GanDistError(f"no space left for {what}: make space and run the same command again") from None
        raise GanDistError(f"cannot write into {what}: make it writable and run the same command again") from None


class _Run:
    """One run over the shards of a plan."""

    def __init__(self, plan: Plan, out: Path, locks: Locks, show: Show) -> None:
        self.plan, self.out, self.locks = plan, out, locks
        self._show = show
        self._progress = partial(show, "preparing")
        self._stages: dict[str, float] = {}
        self._entries = self._bytes = self._peak = self._workers = self._last = 0

    def work(self, shards: Sequence[int], workers: int) -> None:
        """Writes those of `shards` that are missing or damaged.

        Raises:
            GanDistError: another process is writing one of them.
        """
        # which are left to do, by this process alone
        if taken := [shard for shard in shards if not self.locks.take(shard)]:
            raise GanDistError(
                f"another gan-dist prepare is writing {len(taken)} of the shards in {self.out}: wait until it ends"
            )
        with ThreadPoolExecutor(min(8, max(1, workers))) as pool, Ticks(self._show, "checking shards") as tick:
            sound = []
            for is_sound in pool.map(self._is_sound, shards):
                sound.append(is_sound)
                tick()
        todo = [shard for shard, is_sound in zip(shards, sound, strict=True) if not is_sound]
        total = sum(len(self.plan.keys(shard)) for shard in shards)
        done = total - sum(len(self.plan.keys(shard)) for shard in todo)
        self._progress(done, total)
        # decode them, in parallel and in order; write each as its jobs finish
        side = self.plan.image.resolution
        jobs = [make_jobs([self.plan.entries[key] for key in self.plan.keys(shard)], side) for shard in todo]
        self._workers = workers
        flat = [job for of_shard in jobs for job in of_shard]
        with closing(run_jobs(flat, self.plan.sources, self.plan.image, workers)) as finished:
            for shard, of_shard in zip(todo, jobs, strict=True):
                (self.out / FOLDER / f"{shard_name(shard)}.json").unlink(missing_ok=True)
                self._clear(shard)
                with ShardWriter(self.out, shard, self.plan.image.resolution) as writer:
                    part: Part = {"plan": self.plan.digest, "rejects": [], "ids": Counter(), "flags": Counter()}
                    part["contents"] = []
                    keys = iter(self.plan.keys(shard))
                    for _ in of_shard:
                        self._write(next(finished), keys, writer, part)
                        self._progress(done := done + self._last, total)
                    began = perf_counter()
                    info = writer.commit()
                part["shard"] = asdict(info) if info else None
                write_record(self.out / FOLDER / f"{shard_name(shard)}.json", part)
                self._add_time("write", perf_counter() - began)

    def _clear(self, shard: int) -> None:
        """Removes what a killed run left of a shard, unless without locks another may be writing it."""
        if not self.locks.missing:
            tar = self.out / shard_name(shard)
            for path in (tar, tar.with_suffix(".jsonl"), self.out / FOLDER / f"{tar.name}.json"):
                clear_temporaries(path)

    def _write(self, done: Done, keys: Iterator[int], writer: ShardWriter, part: Part) -> None:
        began = perf_counter()
        plan = self.plan
        for outcome in done.outcomes:
            key = next(keys)
            entry, label = plan.entries[key], plan.ids[key]
            part["contents"].append(outcome.content)
            if outcome.reason:
                reject = {"reason": outcome.reason, "detail": outcome.detail}
                part["rejects"].append({"key": key} | plan.describe(entry) | reject)
            else:
                record = plan.describe(entry) | outcome.record | ({} if label is None else {"label": label})
                writer.add(key, outcome.pixels, record)
                part["ids"][-1 if label is None else label] += 1
                part["flags"].update(outcome.record.get("flags", ()))
            self._bytes += entry.packed or entry.size
        self._last = len(done.outcomes)
        self._entries += self._last
        self._peak = max(self._peak, done.peak)
        for name, seconds in {**done.seconds, "write": perf_counter() - began}.items():
            self._add_time(name, seconds)

    def _add_time(self, stage: str, seconds: float) -> None:
        self._stages[stage] = self._stages.get(stage, 0.0) + seconds

    def _part(self, shard: int) -> Part | None:
        """Returns the record of a finished shard of this plan that is there, or None."""
        part = read_record(self.out / FOLDER / f"{shard_name(shard)}.json")
        if not part or part["plan"] not in self.plan.accepted:
            return None
        info = ShardInfo(**part["shard"]) if part["shard"] else None
        there = info is None or ((self.out / info.file).exists() and (self.out / info.sidecar).exists())
        return part if there else None

    def _is_sound(self, shard: int) -> bool:
        part = self._part(shard)
        if part is None:
            return False
        if part["shard"] is None:
            return True
        info = ShardInfo(**part["shard"])
        for name, digest in ((info.file, info.sha256), (info.sidecar, info.sidecar_sha256)):
            try:
                with (self.out / name).open("rb") as stream:
                    if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                        return False
            except OSError:
                return False
        return True

    def account(self, seconds: float) -> Account:
        """Returns the account of all finished shards, whoever wrote them."""
        plan = self.plan
        parts = [(shard, part) for shard in range(plan.num_shards) if (part := self._part(shard))]
        ids = sum((Counter({int(i): n for i, n in part["ids"].items()}) for _, part in parts), Counter())
        rejected = Counter(reject["reason"] for _, part in parts for reject in part["rejects"])
        flags: Counter[str] = sum((Counter(part["flags"]) for _, part in parts), Counter())
        bytes_done = sum(
            plan.entries[key].packed or plan.entries[key].size for shard, _ in parts for key in plan.keys(shard)
        )
        return Account(
            out=str(self.out),
            seen=plan.counts["seen"],
            written=ids.total(),
            rejected=dict(sorted(rejected.items())),
            replaced=plan.counts["replaced"],
            skipped=plan.counts["skipped"],
            duplicates=len(plan.duplicates),
            classes={name: ids[i] for i, name in enumerate(plan.classes)},
            unlabelled=ids[-1] if plan.classes else 0,
            ambiguous=plan.counts["labels"].get("ambiguous", 0),
            flags=dict(sorted(flags.items())),
            shards=plan.num_shards,
            shards_done=len(parts),
            source_bytes=bytes_done,
            notes=[
                *plan.notes,
                *([_FAST] if plan.image.fast_checks else []),
                *([] if libtiff.available() else [_UNHEARD.format("libtiff", "TIFF")]),
                *([] if webp.available() else [_UNHEARD.format("libwebp", "WebP")]),
                *([] if avif.available() else [_UNHEARD.format("dav1d", "AVIF")]),
                *([_NO_LOCKS] if self.locks.missing else []),
                *([_NOT_ALL] if len(parts) < plan.num_shards else []),
            ],
            entries=self._entries,
            read_bytes=self._bytes,
            seconds=seconds,
            workers=self._workers,
            stages=dict(self._stages),
            peak_worker_bytes=self._peak,
        )

    def finish(self, account: Account, max_reject_fraction: float) -> None:
        """Writes the lists, the contact sheet and, last, the manifest."""
        with self.locks.hold(_FINISH_LOCK):
            for name in (REJECTS, DUPLICATES, TIMINGS, SHEET, MANIFEST):
                clear_temporaries(self.out / name)
            parts = [part for shard in range(self.plan.num_shards) if (part := self._part(shard))]
            rejects = [reject for part in parts for reject in part["rejects"]]
            if not account.written:
                first = rejects[0]
                reasons = ", ".join(f"{count} {reason}" for reason, count in account.rejected.items())
                raise _NothingLeft(
                    f"none of {len(rejects):,} images could be used: {reasons}"
                    f" (first: {first['source']}/{first['path']!r}: {first['reason']} {first['detail']})"
                )
            write_atomically(self.out / REJECTS, _lines(rejects))
            if self.plan.recipe["dedupe"]:
                write_atomically(self.out / DUPLICATES, _lines(self.plan.duplicates))
            if account.entries or not (self.out / TIMINGS).exists():
                write_atomically(self.out / TIMINGS, json.dumps(account.timings(), indent=1).encode() + b"\n")
            if account.reject_fraction > max_reject_fraction and not present(self.out / MANIFEST):
                raise TooManyRejects(
                    f"{account.reject_fraction:.1%} of the images were rejected, {max_reject_fraction:.1%} is allowed: "
                    f"see {self.out / REJECTS}; the same command with a higher --max-reject-fraction ends at once",
                    account,
                )
            shards = tuple(ShardInfo(**part["shard"]) for part in parts if part["shard"])
            resolution = self.plan.image.resolution
            manifest = Manifest(FORMAT, resolution, self.plan.recipe, self.plan.classes, account.totals(), shards)
            write_atomically(self.out / SHEET, contact_sheet(self.out, manifest, seed=self.plan.digest))
            write_atomically(self.out / MANIFEST, manifest.to_bytes())
            shutil.rmtree(self.out / FOLDER / STAGED, ignore_errors=True)


def _lines(records: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)

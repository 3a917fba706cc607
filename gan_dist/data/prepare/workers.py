"""Entries -> squares, in parallel and in order, in worker processes that may crash.

Processes, not threads: on 64-pixel photos, where half of the time is Python's, two threads were 0.7-1.0 times as fast
as one (two processes 1.0-1.8 times, both on busy shared cores); on 2000x1500 JPEGs there was no difference. A process
can also be limited in memory, and its crash costs one picture. They are plain subprocesses with pipes, without
multiprocessing: nothing is forked under torch's threads, and the caller's __main__ is not imported again, so that
scripts and notebooks need no guard.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, perf_counter
from typing import IO, Any

from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.images import Recipe, square
from gan_dist.data.prepare.reading import Reader, content_digest
from gan_dist.data.prepare.sources import Entry, Source
from gan_dist.utils.errors import GanDistError

JOB_ENTRIES, JOB_BYTES, JOB_SQUARES = 32, 2 * 2**20, 32 * 2**20
"""A job has at most this many entries, encoded bytes, and bytes of squares (but at least one entry): enough that the
pipe costs nothing, and few enough that workers end together and that a result takes little memory."""
TIME_LIMIT_S = 300.0
"""A worker without a result for this long is killed; its job is repeated picture by picture."""
DATA_LIMIT = 1000 * 2**20
"""Bytes of private memory that a worker may allocate, where the system can limit it."""
_BUFFERED_BYTES = 256 * 2**20
_READY = "ready"
WORKER_CODE = "from gan_dist.data.prepare.workers import serve; serve()"


@dataclass(slots=True)
class Outcome:
    """The result for an entry: `pixels` with the sidecar's `record`, or the `reason` of a reject with its detail;
    `content`: a digest of the file, empty where it could not be read."""

    pixels: bytes = b""
    record: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    detail: str = ""
    content: str = ""


@dataclass(slots=True)
class Done:
    """A finished job: an outcome for each entry, seconds by stage, the worker's peak memory in bytes."""

    outcomes: list[Outcome]
    seconds: dict[str, float]
    peak: int = 0


def work(entries: Sequence[Entry], reader: Reader, recipe: Recipe) -> Done:
    """Returns the outcomes of a job.

    Raises:
        SourceChanged: a file has changed since it was listed.
        GanDistError: a source can no longer be read.
    """
    done = Done([], {"read": 0.0, "decode": 0.0, "resize": 0.0})
    for entry in entries:
        began, content = perf_counter(), ""
        try:
            data = reader.read(entry)
            content = content_digest(data)
            done.seconds["read"] += perf_counter() - began
            began = perf_counter()
            made = square(data, recipe)
        except (Rejected, MemoryError) as error:
            rejected = error if isinstance(error, Rejected) else Rejected("too_large", "not enough memory")
            done.seconds["decode"] += perf_counter() - began
            done.outcomes.append(Outcome(reason=rejected.reason, detail=rejected.detail, content=content))
            continue
        for stage, seconds in made.seconds.items():
            done.seconds[stage] += seconds
        record: dict[str, Any] = {"width": made.width, "height": made.height, "mode": made.mode, "format": made.format}
        record |= {"flags": made.flags} if made.flags else {}
        done.outcomes.append(Outcome(made.pixels.tobytes(), record, content=content))
    done.peak = _peak_memory()
    return done


def _peak_memory() -> int:
    # Not getrusage: after fork and exec it starts with the parent's peak
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not on Linux
        return 0
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def serve() -> None:
    """The worker process: reads sources and recipe, then jobs, from stdin; writes results to the former stdout."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR2"):  # sent to the whole process group: the parent decides
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's remarks about odd files; the outcome says what matters
    out = os.fdopen(os.dup(1), "wb")
    for stream in (1, 2):  # libtiff and libjpeg comment there on every damaged file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = DATA_LIMIT if hard == resource.RLIM_INFINITY else min(hard, DATA_LIMIT)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    sources, recipe = pickle.load(sys.stdin.buffer)
    reader = Reader(sources)
    pickle.dump(_READY, out)
    out.flush()
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            entries = pickle.load(sys.stdin.buffer)
            try:
                answer: Done | GanDistError = work(entries, reader, recipe)
            except GanDistError as error:
                answer = error
            except Exception:
                answer = GanDistError(f"a worker failed, which is a bug in gan_dist: {traceback.format_exc()}")
            pickle.dump(answer, out, protocol=5)
            out.flush()
    os._exit(0)  # no flushing into a broken pipe


class _Worker:
    """A worker process and the parent's ends of its pipes."""

    def __init__(self, sources: Sequence[Source], recipe: Recipe) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}; {WORKER_CODE}"
        threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        command = [sys.executable, "-c", code]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | threads
            )
        except OSError as error:
            raise GanDistError(f"no worker process can be started ({error.strerror}): try fewer --workers") from None
        self.busy_since: float | None = None
        self.timed_out = False
        self._setup = (list(sources), recipe)
        self._started = False

    def ask(self, entries: Sequence[Entry]) -> Done | GanDistError:
        """Returns the worker's result.

        Raises:
            EOFError, OSError, pickle.UnpicklingError: it died of this job.
            GanDistError: it died before its first job, which is no picture's fault.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        self.busy_since = monotonic()
        try:
            if not self._started:
                self._start(stdin, stdout)
            pickle.dump(list(entries), stdin, protocol=5)
            stdin.flush()
            answer: Done | GanDistError = pickle.load(stdout)
            return answer
        finally:
            self.busy_since = None

    def _start(self, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        try:
            pickle.dump(self._setup, stdin, protocol=5)
            stdin.flush()
            self._started = pickle.load(stdout) == _READY
        except (EOFError, OSError, pickle.UnpicklingError):
            self.end(kill=True)
            status = self.process.returncode
            raise GanDistError(f"a worker process ended before its first picture (status {status})") from None

    def end(self, kill: bool = False) -> None:
        """Ends the process, and waits for it."""
        if kill:
            self.process.kill()
        streams: tuple[IO[bytes] | None, ...] = (self.process.stdin, self.process.stdout)
        for stream in streams:
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _most_entries(resolution: int) -> int:
    return max(1, min(JOB_ENTRIES, JOB_SQUARES // (3 * resolution**2)))


def make_jobs(entries: Sequence[Entry], resolution: int) -> list[list[Entry]]:
    """Returns `entries` cut into jobs, in order; `resolution` is that of the squares."""
    jobs: list[list[Entry]] = []
    weight, most = 0, _most_entries(resolution)
    for entry in entries:
        if not jobs or len(jobs[-1]) >= most or weight + _weight([entry]) > JOB_BYTES:
            jobs.append([])
            weight = 0
        jobs[-1].append(entry)
        weight += _weight([entry])
    return jobs


def _weight(job: Sequence[Entry]) -> int:
    """Returns the bytes to read for a job, an estimate of its time."""
    return sum(entry.packed or entry.size for entry in job)


def run_jobs(
    jobs: Sequence[Sequence[Entry]], sources: Sequence[Source], recipe: Recipe, workers: int
) -> Generator[Done]:
    """Returns a generator of the finished jobs in order; its `workers` processes (0: this one) start immediately.

    Raises:
        SourceChanged: a file has changed since it was listed.
        GanDistError: no worker can be started.
    """
    if workers == 0 or not jobs:
        generator = _run_here(jobs, sources, recipe)
    else:
        generator = _run_there(_Pool(jobs, sources, recipe, min(workers, len(jobs))), len(jobs))
    generator.send(None)  # enters its context, so that closing it always ends the workers
    return generator


def _run_here(jobs: Sequence[Sequence[Entry]], sources: Sequence[Source], recipe: Recipe) -> Generator[Done]:
    with closing(Reader(sources)) as reader:
        yield Done([], {})
        for job in jobs:
            yield work(job, reader, recipe)


def _run_there(pool: _Pool, jobs: int) -> Generator[Done]:
    with closing(pool):
        yield Done([], {})
        for number in range(jobs):
            yield pool.take(number)


class _Pool:
    """A thread for each worker feeds it; a bounded number of results wait for their turn."""

    def __init__(
        self, jobs: Sequence[Sequence[Entry]], sources: Sequence[Source], recipe: Recipe, workers: int
    ) -> None:
        self._jobs, self._sources, self._recipe = jobs, sources, recipe
        job_bytes = _most_entries(recipe.resolution) * 3 * recipe.resolution**2
        self._window = max(4 * workers, _BUFFERED_BYTES // job_bytes)
        # The last jobs start largest first, so that the workers end together.
        tail = min(len(jobs), self._window, 16 * workers)
        head = len(jobs) - tail
        largest = sorted(range(head, len(jobs)), key=lambda i: -_weight(jobs[i]))
        self._order: list[int] = [*range(head), *largest]
        self._next = 0  # in _order
        self._taken = 0  # jobs that the consumer has had
        self._done: dict[int, Done] = {}
        self._failure: BaseException | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._workers: list[_Worker | None] = [None] * workers
        self._threads = [threading.Thread(target=self._feed, args=(i,), daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def take(self, number: int) -> Done:
        """Returns job `number` when it is finished; kills workers that exceed the time limit meanwhile."""
        with self._changed:
            while number not in self._done:
                if self._failure is not None:
                    raise self._failure
                self._changed.wait(1.0)
                self._kill_overdue()
            self._taken = number + 1
            self._changed.notify_all()
            return self._done.pop(number)

    def _kill_overdue(self) -> None:
        for worker in self._workers:
            since = worker.busy_since if worker else None
            if worker and since is not None and monotonic() - since > TIME_LIMIT_S:
                worker.timed_out = True
                worker.process.kill()

    def _feed(self, place: int) -> None:
        try:
            while (number := self._draw()) is not None:
                done = self._process(place, self._jobs[number])
                with self._changed:
                    self._done[number] = done
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _draw(self) -> int | None:
        with self._changed:
            while not self._closing and self._next < len(self._order):
                number = self._order[self._next]
                # the tail is no longer than the window, so the job that the consumer waits for never waits here
                if self._next < self._taken + self._window:
                    self._next += 1
                    return number
                self._changed.wait()
        return None

    def _process(self, place: int, job: Sequence[Entry]) -> Done:
        """Returns a finished job. A job that kills its worker is repeated picture by picture; a picture that kills two
        workers is rejected."""
        for attempt in range(2):
            if self._closing:
                raise GanDistError("preparation was stopped")
            worker = self._workers[place] or _Worker(self._sources, self._recipe)
            self._workers[place] = worker
            try:
                answer = worker.ask(job)
            except (EOFError, OSError, pickle.UnpicklingError):
                self._workers[place] = None
                worker.end(kill=True)
                if len(job) > 1:
                    return self._one_by_one(place, job)
                if attempt:
                    reason = "timed_out" if worker.timed_out else "decoder_crashed"
                    return Done([Outcome(reason=reason, detail=f"worker status {worker.process.returncode}")], {})
                continue
            if isinstance(answer, GanDistError):
                raise answer
            return answer
        raise AssertionError("unreachable")

    def _one_by_one(self, place: int, job: Sequence[Entry]) -> Done:
        total = Done([], {})
        for entry in job:
            part = self._process(place, [entry])
            total.outcomes += part.outcomes
            total.peak = max(total.peak, part.peak)
            for stage, seconds in part.seconds.items():
                total.seconds[stage] = total.seconds.get(stage, 0.0) + seconds
        return total

    def close(self) -> None:
        """Ends all workers and threads; busy workers are killed."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for worker in self._workers:
            if worker and worker.busy_since is not None:
                worker.process.kill()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            if worker:
                worker.end()

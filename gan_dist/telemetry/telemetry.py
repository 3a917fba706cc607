"""What a run logs: TensorBoard, metrics.jsonl and the console. Only rank 0 writes; each logged step stands once.

Every tag of a run is written here, by `scalars`, `images` and `text` (hparams.py's are a sweep's), and named where its
value is made: training/update.py (STATS), training/statistics.py, evaluation/protocol.py and, for pictures and texts,
gallery.py. docs/watching.md lists them all.

A run that resumes from step s drops the metric lines after s (events stay: they are its history) and opens TensorBoard
with purge_step = s + 1, so curves are clean through any number of restarts.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from gan_dist.runs.metrics_file import TEXTS, history_table, read_metrics
from gan_dist.telemetry.console import RunConsole
from gan_dist.utils.errors import first_line
from gan_dist.utils.files import write_atomically
from gan_dist.utils.pictures import png_bytes
from gan_dist.utils.tensors import HostCopy

# TensorBoard's own, in pure Python, takes a tenth of a second for a grid of samples, and most of Python's lock with it:
# the GPU that this process feeds runs dry meanwhile.
pywrap_tensorflow.crc32c = google_crc32c.value

EQUILIBRIUM = -math.log(4)
"""V(D, G) where D cannot tell real from fake: log 1/2 + log 1/2 (Goodfellow 2014, theorem 1)."""

POLL_S = 0.002
"""Between looks at a picture that is on its way from the device."""
LATER_S = 1.0
"""How long one is waited for when an earlier one has not come within the time limit."""

CUSTOM_CHARTS = {
    "The game": {
        "Losses": ["Multiline", ["loss/discriminator", "loss/generator"]],
        "D(x), and D(G(z)) before and after D's update": [
            "Multiline",
            ["probability/real", "probability/fake", "probability/fake_after_update"],
        ],
        "V(D, G) and the equilibrium -log 4": ["Multiline", ["value/minimax", "value/equilibrium"]],
        "Lower bound of the Jensen-Shannon divergence": ["Multiline", ["value/jsd_lower_bound"]],
    },
    "Throughput": {
        "Images a second": ["Multiline", ["throughput/images_per_second"]],
        "Share of time spent waiting for data": ["Multiline", ["throughput/data_wait_fraction"]],
        "Share of time in which the GPU was busy": ["Multiline", ["throughput/gpu_utilization"]],
        "Seconds a step": ["Multiline", ["throughput/step_seconds"]],
        "Device memory (GiB)": ["Multiline", ["memory/device_gib"]],
    },
    "Optimisation": {
        "Gradient norms": ["Multiline", ["gradient_norm/discriminator", "gradient_norm/generator"]],
        "Update-to-weight ratios": ["Multiline", ["update_ratio/discriminator", "update_ratio/generator"]],
        "Learning rates": ["Multiline", ["learning_rate/discriminator", "learning_rate/generator"]],
        "Skipped updates, in all": ["Multiline", ["updates/skipped"]],
    },
}
"""TensorBoard's custom scalars page, which shows some of the tags together: sections, charts, each chart's tags."""


@dataclass(frozen=True)
class Picture:
    """A picture that is made of what has reached the host."""

    tag: str
    make: Callable[[Tensor], Tensor]
    """From what was copied to uint8 [3, H, W]; runs on the thread that encodes."""
    path: Path | None = None


class Telemetry:
    """Writes a run's figures, pictures and history on the rank that is `active`; on other ranks each call does nothing.

    A full or broken disk ends nothing: what cannot be written becomes a warning, and training goes on.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        active: bool,
        step: int,
        total_steps: int,
        console: bool = True,
        verbosity: int = 0,
        timeout_s: float = 300.0,
    ) -> None:
        """`step` is that of the checkpoint that was resumed from, 0 for a new run; verbosity as in RunConsole;
        timeout_s: dist.timeout_s, how long a picture is waited for."""
        self._console = RunConsole(run_dir.name, step, total_steps, verbosity=None)
        self._board: SummaryWriter | None = None
        self._timeout_s = self._patience_s = timeout_s
        self._given_up = threading.Event()
        self._active = active
        if not active:
            return
        self._path = run_dir / "metrics.jsonl"
        self._total = total_steps
        rewind(self._path, step)
        self._metrics = self._path.open("a", encoding="utf-8")
        self._texts: dict[str, str] = {}  # texts that wait for a step of their own
        earlier = [line["step"] for line in read_metrics(self._path) if line.get("event") == TEXTS]
        self._texts_until = max(earlier, default=-1)  # newest step at which an earlier attempt left texts
        self._texts_noted = -1
        self._changed = False  # whether something happened that TensorBoard's history does not have yet
        self._newest: dict[str, int] = {}  # tag -> newest step written
        folder = run_dir / "tensorboard"
        fresh = put_in_order(folder) == 0
        # A new run has drawn nothing yet, and a run resumed at step 0 draws its first pictures again.
        self._board = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
        if fresh:
            self._board.add_custom_scalars(CUSTOM_CHARTS)
            self._board.flush()
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._pictures: list[Future[None]] = []
        self._lock = threading.Lock()  # a checkpoint's thread flushes what the training path writes
        if console:
            self._console = RunConsole(run_dir.name, step, total_steps, verbosity=verbosity)

    def progress(self, step: int) -> None:
        """Notes that `step` is done. Cheap: called at every step."""
        self._console.progress(step)

    def scalars(self, step: int, images_seen: int, values: Mapping[str, float]) -> None:
        """Writes one point of every tag in `values`."""
        if self._active:
            plain = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
            self._write({"step": step, "images_seen": images_seen, **plain})
            self._write_texts(step)
            constant = {"value/equilibrium": EQUILIBRIUM} if "value/minimax" in values else {}
            for tag, value in {**values, **constant}.items():
                self._on_board(
                    tag, step, partial(SummaryWriter.add_scalar, tag=tag, scalar_value=value, global_step=step)
                )
        self._console.scalars(step, values)

    def image(self, tag: str, step: int, image: Tensor, path: Path | None = None) -> None:
        """Writes a picture, uint8 [3, H, W] on the CPU, to TensorBoard, and as a PNG file to `path` if given.

        It is encoded once, on a thread: the training path pays nothing for it.
        """
        if self._active:
            self._on_thread(self._draw, tag, step, image, path)

    def images(self, step: int, copy: HostCopy, pictures: Sequence[Picture]) -> None:
        """Writes pictures of what is still on its way to the host, as `image` does.

        The thread waits for it, `timeout_s` at most: then the step has none of them, and a warning says so.
        """
        if self._active:
            self._on_thread(self._draw_what_arrives, step, copy, pictures)

    def text(self, tag: str, step: int, text: str) -> None:
        """Writes a text (Markdown) to TensorBoard: at once in a new run, with the next point in one that goes on.

        An attempt's texts stand at a step that no earlier attempt gave texts: not every reader purges those.
        """
        if self._active:
            self._texts[tag] = text
            if step == 0:
                self._write_texts(0)

    def event(self, name: str, step: int, **fields: Any) -> None:
        """Writes a line of the run's history: a start, a stop, a skip, ...; a start also says where the run ends."""
        if self._active:
            if name == "start":
                fields.setdefault("total_steps", self._total)
            self._write({"event": name, "step": step, "time": round(time.time(), 3), **fields})
            self._flush_metrics()
            self._changed = True

    def log(self, line: str) -> None:
        """Prints a line on the console."""
        self._console.log(line)

    def warn(self, line: str, step: int | None = None) -> None:
        """Prints a warning, which stays in sight on a terminal; with `step`, also adds it to the run's history."""
        self._console.warn(line)
        if self._active and step is not None:
            self.event("warning", step, reason=line)

    def flush(self) -> None:
        """Returns once everything is in the files, on the disk."""
        if self._active:
            self._finish_pictures()
            self._flush_metrics()
            self._guard(lambda: os.fsync(self._metrics.fileno()))
            if self._board is not None:
                self._guard(self._board.flush)

    def close(self, orderly: bool = True) -> None:
        """Flushes and closes the files and the console. A second call does nothing.

        Not `orderly` where the device hangs: pictures that are still on their way from there are given up.
        """
        if not orderly:
            self._given_up.set()
        self._console.close()
        if self._active:
            self._finish_pictures()
            self._encoder.shutdown()
            self._write_texts(max(self._newest.values(), default=0))
            self._guard(self._metrics.close)
            if self._board is not None:
                self._guard(self._board.close)
            self._active = False

    def _write_texts(self, step: int) -> None:
        """Writes the texts that wait, and the history if it has changed, at `step`, where that is free of texts."""
        if step <= self._texts_until or not (self._texts or self._changed):
            return
        texts = dict(self._texts)
        if step > 0 and step > self._newest.get("history", -1):
            texts["history"] = history_table(read_metrics(self._path))
            self._changed = False
        self._texts = {}
        if texts and step != self._texts_noted:
            self._texts_noted = step
            self._write({"event": TEXTS, "step": step, "time": round(time.time(), 3)})
            self._flush_metrics()
        for tag, text in texts.items():
            self._on_board(tag, step, partial(SummaryWriter.add_text, tag=tag, text_string=text, global_step=step))

    def _on_board(self, tag: str, step: int, write: Callable[[SummaryWriter], object]) -> None:
        """Writes to TensorBoard, unless `tag` already has this step: a step stands once."""
        board = self._board
        if board is None or self._newest.get(tag, -1) >= step:
            return
        self._newest[tag] = step
        try:
            write(board)
        except OSError as error:
            # Its writer thread is gone, and every later call would raise the same again.
            self._board = None
            self._console.warn(f"TensorBoard's file cannot be written ({error.strerror or error}); it gets no more")

    def _on_thread(self, draw: Callable[..., None], *arguments: Any) -> None:
        with self._lock:
            self._pictures = [job for job in self._pictures if not job.done() or job.exception()]
            self._pictures.append(self._encoder.submit(draw, *arguments))

    def _draw_what_arrives(self, step: int, copy: HostCopy, pictures: Sequence[Picture]) -> None:
        if reason := self._await(copy):
            self.warn(f"the samples of step {step} are not drawn: {reason}", step)
            return
        for picture in pictures:
            self._guard(partial(self._draw, picture.tag, step, picture.make(copy.host), picture.path))

    def _await(self, copy: HostCopy) -> str:
        """Returns nothing once the copy has arrived, or why it does not."""
        limit = time.monotonic() + self._patience_s
        try:
            if copy.device.type == "cuda":
                torch.cuda.set_device(copy.device)  # a new thread's is GPU 0, where it would open a context
            while not copy.arrived:
                if time.monotonic() > limit:
                    self._patience_s = min(LATER_S, self._timeout_s)  # the next one stands in the same queue
                    return f"the device did not finish them within dist.timeout_s={self._timeout_s:g} s"
                if self._given_up.wait(POLL_S):
                    return "the device hangs"
        except RuntimeError as error:  # CUDA's, of whatever the device did before
            return first_line(error)
        self._patience_s = self._timeout_s
        return ""

    def _draw(self, tag: str, step: int, image: Tensor, path: Path | None) -> None:
        png = png_bytes(image)
        if path is not None:
            write_atomically(path, png, make_folder=True)
            self._console.sample(path)
        height, width = image.shape[1:]
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        summary = Summary(value=[Summary.Value(tag=tag, image=picture)])
        # add_image would encode it a second time.
        self._on_board(tag, step, lambda board: _file_writer(board).add_summary(summary, step))

    def _finish_pictures(self) -> None:
        with self._lock:
            jobs, self._pictures = self._pictures, []
        for job in jobs:
            self._guard(job.result)

    def _flush_metrics(self) -> None:
        with self._lock:
            self._guard(self._metrics.flush)

    def _guard(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            self._console.warn(f"a file of the run cannot be written: {error}; training goes on")

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._lock:
            self._guard(lambda: self._metrics.write(json.dumps(line) + "\n"))


def _file_writer(board: SummaryWriter) -> Any:
    return board._get_file_writer()  # type: ignore[no-untyped-call]


def rewind(path: Path, step: int) -> None:
    """Drops the metric lines after `step` and any torn line from the file at `path`, all at once or not at all."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if "event" in line or line.get("step", 0) <= step]
    content = "".join(json.dumps(line) + "\n" for line in kept)
    if content != path.read_text(encoding="utf-8", errors="replace"):
        write_atomically(path, content.encode())


def put_in_order(folder: Path) -> int:
    """Returns how many event files `folder` holds, after renaming them where a new one would not sort behind them.

    TensorBoard reads a run's files by name, which begins with the second of their making, and never goes back: a
    restart within that second, or on a host whose clock is behind, would be read out of order or not at all.
    """
    files = sorted(folder.glob("events.out.tfevents.*"))
    now = int(time.time())
    stamps = [file.name.split(".")[3] for file in files]
    if stamps and stamps[-1].isdigit() and int(stamps[-1]) >= now:
        for number, (file, stamp) in enumerate(zip(files, stamps, strict=True)):
            rest = file.name.removeprefix(f"events.out.tfevents.{stamp}")
            file.rename(folder / f"events.out.tfevents.{now - len(files) + number:010d}{rest}")
    return len(files)

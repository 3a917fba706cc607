"""The trainer: builds the players, resumes the run, and loops over synchronised steps until the game is over."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gan_dist.config.diff import flatten
from gan_dist.config.schema import Config, load_config, presets, to_yaml
from gan_dist.data.gather import gather
from gan_dist.data.order import Order, rank_slice
from gan_dist.data.shards import Dataset
from gan_dist.data.stream import Stream
from gan_dist.distributed.failures import naming_lost_ranks
from gan_dist.distributed.heartbeat import with_heartbeat
from gan_dist.distributed.preflight import check_disk, preflight
from gan_dist.distributed.world import World, join
from gan_dist.report.report import make_report
from gan_dist.runs.lease import Lease, claim
from gan_dist.runs.naming import choose_run_dir
from gan_dist.runs.run_dir import Start, prepare_start, resolved_changes, write_start
from gan_dist.telemetry.gallery import Gallery
from gan_dist.telemetry.telemetry import Telemetry
from gan_dist.training.checkpointer import Saver
from gan_dist.training.control import ControlWord, Decision, Referee, Watchman, ask, environment, out_of_memory
from gan_dist.training.evaluator import Examiner
from gan_dist.training.keeper import Keeper
from gan_dist.training.machine import torch_settings
from gan_dist.training.opening import open_for
from gan_dist.training.runner import make_runner, resolve_precision
from gan_dist.training.setup import build_average, build_update
from gan_dist.training.statistics import Scalars
from gan_dist.training.update import draw_flips, draw_latents
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.stop import Cancelled, StopRequest
from gan_dist.utils.tensors import assert_ranks_agree, copy_state, state_digest


@dataclass(frozen=True)
class Outcome:
    """What a call of `train` did and where it left things."""

    run_dir: Path
    step: int
    total_steps: int
    images_seen: int
    stopped: str | None
    """Why the run stopped before its end (run the same command again), or None when it is done."""
    images_per_second: float
    seconds: float


def train(
    config: str | Path | Mapping[str, Any] | Config,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    run_dir: str | Path | None = None,
    from_run: str | None = None,
    max_steps: int | None = None,
    stop: StopRequest | None = None,
    console: bool = True,
    verbosity: int = 0,
    command: Sequence[str] = (),
) -> Outcome:
    """Trains a run, or continues it, and returns what was done.

    `config` is a YAML file, a plain mapping or a Config; `overrides` are `section.key=value` words. The run lies in
    `run_dir`, or under $GAN_DIST_RUNS as `name` (default: the file's stem). `max_steps` ends the whole run there.
    Another thread or a signal handler may end it early through `stop`. Under torchrun every rank calls this alike.
    `verbosity` -1 prints warnings only, 1 every tag; without `console` nothing is printed.
    Raises UserError for bad input (nothing is then half-written) and GanDistError for failures of one line.
    """
    settings = load_config(config, overrides)
    directory, voice = choose_run_dir(config, name, run_dir), verbosity if console else None
    if max_steps is not None and max_steps < 1:
        raise UserError(f"--max-steps: expected 1 or more, found {max_steps}")
    if settings.train.threads is not None:
        torch.set_num_threads(settings.train.threads)
    with join(
        settings.train.device, settings.dist.backend, settings.dist.init_timeout_s, settings.dist.timeout_s
    ) as world:
        try:
            with (
                naming_lost_ranks(world, directory),
                torch_settings(world.device, settings.train.deterministic),
                open_for(settings, world, stop if stop is not None else StopRequest(), voice) as dataset,
            ):
                # Where a dataset lies may differ between hosts; what is asked of the ranks may not.
                task = {**flatten(settings.to_dict()), "--max-steps": max_steps}
                del task["data.shards"], task["data.cache_dir"]
                warnings = preflight(world, dataset.identity, task)

                def check() -> Start:
                    start = prepare_start(directory, settings, dataset.identity, from_run=from_run, command=command)
                    return replace(start, notes=(*warnings, *start.notes))

                with (
                    claim(directory, world, check, print if voice is not None else lambda line: None) as (start, lease),
                    Trainer(settings, world, dataset, directory, start, lease, max_steps, stop, voice) as trainer,
                ):
                    return trainer.run()
        except (RuntimeError, MemoryError) as error:
            if line := out_of_memory(error, settings.train.global_batch, world.size):
                raise line from error
            raise


class Trainer:
    """One run on this rank: everything that is built once, and the loop. A context that leaves nothing running."""

    def __init__(
        self,
        config: Config,
        world: World,
        dataset: Dataset,
        run_dir: Path,
        start: Start,
        lease: Lease | None,
        max_steps: int | None,
        stop: StopRequest | None,
        verbosity: int | None,
    ) -> None:
        self.config, self.world, self.dataset, self.run_dir = config, world, dataset, run_dir
        self.stop = stop if stop is not None else StopRequest()
        self.batch = config.train.global_batch
        self.lo, self.hi = rank_slice(self.batch, world.rank, world.size)
        self.precision, self._why_precision = resolve_precision(config.train.precision, world.device)
        self.step = self.images_seen = 0
        images = math.ceil(config.train.epochs * dataset.num_samples)
        self.total_steps = math.ceil(images / (config.optim.d_steps * self.batch))
        self.end = min(self.total_steps, max_steps or self.total_steps)

        self.update = build_update(config, world, self.precision)
        self.runner = make_runner(config.train.runner, self.update)
        self.fixed_latents = torch.randn(
            config.log.grid, config.model.latent_dim, generator=torch.Generator().manual_seed(config.seed)
        )
        if start.loaded is not None:
            self.update.load_state_dict(start.loaded.state)
            if not start.fresh:
                self.step, self.images_seen = start.loaded.step, int(start.loaded.state["images_seen"])
        self.average = build_average(config, self.update, start)
        if world.size > 1:
            assert_ranks_agree(world.gather_objects(state_digest(self.update.snapshot(), config.train.sync_batchnorm)))
        drawing = self.update.g.network if self.average is None else self.average.network
        self.examiner = Examiner(config, world, dataset, drawing, self.update.d.network, run_dir / "checkpoints")
        self._drawn_step = -1
        self.referee = Referee()

        resolved = {
            "device": world.device.type,
            "precision": self.precision,
            "runner": self.runner.name,
            "threads": torch.get_num_threads(),
            "ranks": world.size,
        }
        self.parent, self.first = start.parent, world.rank == 0
        notes = [*start.notes, *([] if start.fresh else resolved_changes(run_dir, resolved))]
        self.facts = {**environment(world), "dataset": dataset.identity, "parent": start.parent, "resolved": resolved}
        world.from_first(lambda: check_disk(run_dir, self.update.snapshot()))
        world.from_first(lambda: write_start(run_dir, config, self.facts))
        deadline = config.train.stop_after_minutes
        self.watchman = Watchman(self.stop, run_dir, time.monotonic() + 60 * deadline if deadline else None)
        self.saver = Saver(run_dir / "checkpoints", config.checkpoint.keep, world, config.train.sync_batchnorm)
        self._lease, self.saver.guard = lease, self._may_publish
        self.keeper = Keeper(
            self.saver,
            world,
            self._snapshot,
            {k: self.facts[k] for k in ("dataset", "parent", "torch", "world_size")},
            every_steps=config.checkpoint.every_steps,
            every_minutes=config.checkpoint.every_minutes,
            keep_epochs=config.checkpoint.keep_epochs,
            saved_step=-1 if start.fresh else self.step,
        )
        self.stream = Stream(
            dataset,
            Order(dataset.shard_sizes, config.seed, config.data.window_shards),
            position=self.images_seen,
            global_batch=self.batch,
            rank=world.rank,
            size=world.size,
            device=world.device,
            placement=config.data.placement,
        )
        self.telemetry = Telemetry(
            run_dir,
            active=self.first,
            step=self.step,
            total_steps=self.end,
            console=verbosity is not None and self.first,
            verbosity=verbosity or 0,
        )
        self.scalars = Scalars(self.update, dataset.num_samples)
        self.gallery = Gallery(run_dir, self.telemetry, drawing, self.fixed_latents)
        self._announce(notes)

    def _announce(self, notes: Sequence[str]) -> None:
        """Says on the console, and in the run's history, what starts here and from where."""
        verb = "continues" if self.step else "starts"
        self.telemetry.say(
            f"{self.run_dir.name} {verb} at step {self.step} of {self.end}: {self.dataset.num_samples} images, "
            f"batch {self.batch} over {self.world.size} rank(s) on {self.world.device.type}"
        )
        self.telemetry.say(
            f"{self.config.train.epochs:g} epochs at batch {self.batch} are {self.total_steps:,} updates of G, "
            f"{self.total_steps * self.config.optim.d_steps:,} of D; learning rates are as set, whatever the batch"
        )
        self.telemetry.say(f"precision {self.precision}: {self._why_precision}")
        self.telemetry.say(f"runner {self.runner.name}: {self.runner.reason}; samples in {self.stream.placement}")
        for note in notes:
            self.telemetry.say(f"note: {note}")
        self.telemetry.event(
            "start",
            self.step,
            world_size=self.world.size,
            device=self.world.device.type,
            parent=self.parent,
            notes=notes,
        )

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.stream.close()
        self.saver.failure(wait=True)
        self.telemetry.close()

    def run(self) -> Outcome:
        """Returns the outcome after the last step, or after the step at which a stop was agreed."""
        began, first_step = time.monotonic(), self.step
        if self.keeper.saved_step != self.step:
            self._save(wait=True)
        if self._await_data():
            self._introduce()
        if self.step == 0:
            self._draw_samples()
        stopped = self._loop() if self.step < self.end else None
        seconds = time.monotonic() - began
        if self.keeper.saved_step != self.step:
            if stopped is None:
                self._draw_samples()
            self._save(wait=True)
        else:
            self.keeper.await_saved()
        self.telemetry.event("stop" if stopped else "end", self.step, reason=stopped)
        self.telemetry.flush()
        if stopped and self.first:
            self.watchman.forget_file()
        elif self.first:
            self._report()
        rate = (self.step - first_step) * self.config.optim.d_steps * self.batch / max(seconds, 1e-9)
        return Outcome(self.run_dir, self.step, self.end, self.images_seen, stopped, rate, seconds)

    def _await_data(self) -> bool:
        """Returns when the first batch is there on every rank: True, or False when they were asked to stop first."""
        try:
            with_heartbeat(self.world, self.stream.await_first, self.stop)
        except Cancelled:
            return False  # the loop sees to it before its first step
        return True

    def _loop(self) -> str | None:
        """Plays steps until the end (returns None) or until the ranks agree to stop (returns why)."""
        config, device = self.config, self.world.device
        words = ControlWord(device, config.dist.timeout_s)
        if self.world.any(bool(self.stop)):
            return self._why()
        self.scalars.begin(self.step, self.images_seen, self.stream.wait_seconds)
        self.keeper.start_clock()
        while self.step < self.end:
            reals, latents = self._draw()
            save_wanted = self.first and self.keeper.clock_strikes()
            stats = self.runner.step(reals, latents, ask(stop=self._asked(), save=save_wanted))
            self.step += 1
            epoch_before = self.images_seen // self.dataset.num_samples
            self.images_seen += config.optim.d_steps * self.batch
            if self.average is not None:
                self.average.update(self.images_seen)
            word = words.push(stats)
            decision = self._hear(word, self.step - words.lag) if word is not None else Decision()
            self.telemetry.progress(self.step)
            due = self.examiner.is_due(self.step, self.end) and not decision.stop
            examined = self.examiner.examine(self.step, self.telemetry, self._asked) if due else {}
            self.scalars.paused(examined.get("evaluate/seconds", 0.0))
            if self.step % config.log.scalars_every == 0 or self.step == self.end or examined:
                self._log(stats, examined)
            if self.step % config.log.samples_every == 0:
                self._draw_samples()
            epoch_ended = self.images_seen // self.dataset.num_samples > epoch_before
            if decision.stop:
                return self._why()
            if self.keeper.is_due(self.step, epoch_ended, decision.save or bool(self.examiner.best(self.step))):
                self._save(kept=self.keeper.is_for_good(epoch_ended))
        left = words.drain()
        for index, word in enumerate(left, start=self.step - len(left) + 1):
            self._hear(word, index)
        return None

    def _draw(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Returns this rank's slice of the next d_steps batches: uint8 images and latents, all keyed by position."""
        reals, latents = [], []
        width, device = self.config.model.latent_dim, self.world.device
        for k in range(self.config.optim.d_steps):
            position = self.images_seen + k * self.batch
            draw = (self.config.seed, position, self.batch)
            real = self.stream.next()
            if self.config.data.x_flip:
                flips = draw_flips(*draw, self.lo, self.hi, device)
                real = torch.where(flips[:, None, None, None], real.flip(-1), real)
            elif k + 1 < self.config.optim.d_steps:
                real = real.clone()  # the stream reuses its buffer at the following call
            reals.append(real)
            latents.append(draw_latents(*draw, width, self.lo, self.hi, device, self.update.dtype))
        return reals, latents

    def _hear(self, word: list[float], step: int) -> Decision:
        """Returns what the ranks decided with `step`, of which `word` tells; raises when the game is lost."""
        decision = self.referee.hear(word)
        if decision.skipped:
            self.telemetry.warn(f"step {step}: an update was skipped, its gradients were not finite", self.step)
        if self.referee.lost:
            raise GanDistError(
                f"the last {self.referee.in_a_row} steps up to {step} had non-finite gradients and were skipped; "
                f"the last checkpoint is of step {self.keeper.saved_step}; lower optim.g_lr and optim.d_lr"
            )
        return decision

    def _why(self) -> str:
        """Returns the reason for a stop as the console says it: this rank's own, or that another rank asked."""
        reasons = [reason for reason in self.world.gather_objects(self.stop.reason) if reason]
        return reasons[0] if reasons else "another rank asked to stop"

    def _asked(self) -> bool:
        """Returns whether this rank wants to stop; rank 0 looks at the stop file and the time first."""
        if self.first:
            self.watchman.look()
        return bool(self.stop)

    def _log(self, stats: torch.Tensor, examined: Mapping[str, float]) -> None:
        """Writes the step's scalars, what was `examined` and what became of the last checkpoint; on rank 0 alone."""
        if not self.first:
            return
        waited = self.stream.wait_seconds
        values = self.scalars.of(self.step, self.images_seen, waited, stats, self.referee.skipped)
        self.telemetry.scalars(self.step, self.images_seen, {**values, **examined})
        if failure := self.saver.failure():
            if isinstance(failure, GanDistError):
                self.stop.ask(str(failure))  # not a disk's mood: the run is another trainer's now
            self.telemetry.warn(f"a checkpoint could not be saved: {failure}; training goes on", self.step)

    def _draw_samples(self) -> None:
        """Draws the fixed latents' grid of this step, once; on rank 0 alone, in eval mode."""
        if self.first and self._drawn_step != self.step:
            self._drawn_step = self.step
            self.gallery.draw(self.step)

    def _introduce(self) -> None:
        """Tells TensorBoard what is trained on what and where: texts, and the grid of real images."""
        if self.first:
            order = Order(self.dataset.shard_sizes, self.config.seed, self.config.data.window_shards)
            # Of a windowed set only the shards around this position are here.
            begin = self.images_seen if self.stream.placement == "windowed" else 0
            count = min(self.config.log.grid, self.dataset.num_samples)
            reals = gather(self.dataset, order.indices(begin, begin + count))
            self.gallery.introduce(self.step, self.dataset, reals, to_yaml(self.config), self.facts)

    def _report(self) -> None:
        """Makes report.html; a page that cannot be made is no reason to call a finished run failed."""
        try:
            make_report(self.run_dir, presets=presets())
        except (GanDistError, OSError) as error:
            self.telemetry.warn(f"no report was made: {error}")

    def _snapshot(self, into: Any) -> dict[str, Any]:
        """Returns what a checkpoint holds beside its counts: copies, made in the memory of an earlier one's."""
        state = self.update.snapshot(into)
        if self.average is not None:
            state["generator_ema"] = copy_state(self.average.network.state_dict(), (into or {}).get("generator_ema"))
        return {**state, "config": self.config.to_dict()}

    def _save(self, *, kept: bool = False, wait: bool = False) -> None:
        """Saves this step; in the background unless `wait`. Every rank calls it: their states are compared first."""
        best = self.examiner.best(self.step)
        self.scalars.stalled(self.keeper.save(self.step, self.images_seen, kept=kept, wait=wait, best=best))

    def _may_publish(self) -> None:
        """Runs before a checkpoint becomes visible: what was told up to its step is on the disk, the run still ours."""
        self.telemetry.flush()
        if self._lease is not None:
            self._lease.check()

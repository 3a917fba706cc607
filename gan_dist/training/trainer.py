"""The trainer: opens a run and plays synchronised steps until the game is over or the ranks agree to stop."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gan_dist.config.schema import Config, load_config, presets
from gan_dist.data.dataset import gather
from gan_dist.distributed.heartbeat import with_heartbeat
from gan_dist.report.report import make_report
from gan_dist.runs.naming import choose_run_dir
from gan_dist.training.control import ControlReader, ControlRing, Decision, Word
from gan_dist.training.draws import draw_flips, draw_latents
from gan_dist.training.setup import Run, open_run
from gan_dist.utils.errors import GanDistError
from gan_dist.utils.stop import Cancelled, StopRequest


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
    report_at_end: bool = True,
) -> Outcome:
    """Trains a run, or continues it, and returns what was done.

    `config` is a YAML file, a plain mapping or a Config; `overrides` are `section.key=value` words. The run lies in
    `run_dir`, or under $GAN_DIST_RUNS as `name` (default: the file's stem). `max_steps` ends the whole run there.
    Another thread or a signal handler may end it early through `stop`. Under torchrun every rank calls this alike.
    `verbosity` -1 prints warnings only, 1 every tag; without `console` nothing is printed.
    A finished run's page is made last, by rank 0, when the others have left; not with `report_at_end` False.
    Raises UserError for bad input, before anything is written, and GanDistError for other expected failures: either
    has a message of one line.
    """
    return train_in(
        choose_run_dir(config, name, run_dir),
        load_config(config, overrides),
        from_run=from_run,
        max_steps=max_steps,
        stop=stop,
        verbosity=verbosity if console else None,
        command=command,
        report_at_end=report_at_end,
    )


def train_in(
    directory: Path,
    config: Config,
    *,
    from_run: str | None = None,
    max_steps: int | None = None,
    stop: StopRequest | None = None,
    verbosity: int | None = 0,
    command: Sequence[str] = (),
    report_at_end: bool = True,
) -> Outcome:
    """Returns what `train` does, for a configuration that is loaded and a directory that is chosen.

    verbosity None prints nothing; the other arguments and errors are those of `train`.
    """
    stop = stop if stop is not None else StopRequest()
    with open_run(directory, config, from_run, max_steps, stop, verbosity, command) as run:
        outcome, is_first = play(run), run.is_first
    if report_at_end and is_first and outcome.stopped is None:
        report(outcome.run_dir, console=verbosity is not None)
    return outcome


def play(run: Run) -> Outcome:
    """Returns the outcome after the run's last step, or after the step at which a stop was agreed."""
    began, first_step = time.monotonic(), run.step
    if run.checkpointer.saved_step != run.step:
        _save(run, wait=True)  # a checkpoint of step 0, before anything slow
    if _await_first_batch(run):
        _introduce(run)
    if run.step == 0:
        _draw_samples(run)

    stopped = _loop(run) if run.step < run.end else None

    seconds = time.monotonic() - began
    if stopped is None and first_step < run.step and run.step % run.samples_every:  # else the loop has drawn them
        _draw_samples(run)
    if run.checkpointer.saved_step == run.step:
        run.checkpointer.wait()
    else:
        _save(run, wait=True)
    run.telemetry.event("stop" if stopped else "end", run.step, reason=stopped)
    run.telemetry.flush()
    if run.is_first and stopped:
        run.stop_watcher.remove_file()
    rate = (run.step - first_step) * run.d_steps * run.global_batch / max(seconds, 1e-9)
    return Outcome(run.directory, run.step, run.end, run.images_seen, stopped, rate, seconds)


def _loop(run: Run) -> str | None:
    """Plays steps until the end (returns None) or until the ranks agree to stop (returns why)."""
    ring, reader = ControlRing(run.world.device, run.timeout_s), ControlReader()
    if run.world.any(bool(run.stop)):
        return _stop_reason(run)
    run.statistics.start(run.step, run.images_seen, run.stream.wait_seconds)
    run.checkpointer.start_clock()
    run.stream.while_waiting = ring.check
    runner = run.runner.name
    while run.step < run.end:
        # Draw: this rank's slice of the next images, latents and noise.
        reals, latents, draws = _draw_batches(run)

        # Step: D's updates and G's; what this rank asks for goes along.
        run.update.begin(run.images_seen)
        requests = (float(_wants_stop(run)), float(run.is_first and run.checkpointer.clock_is_due()))
        stats = run.runner.step(reals, latents, requests, draws)
        if run.runner.name != runner:
            runner = run.runner.name
            run.telemetry.warn(f"falling back to the {runner} runner: {run.runner.reason}", run.step + 1)
        epoch_ended = run.advance()
        if run.ema is not None:
            run.ema.update(run.images_seen)

        # Note what a log of this step needs of this moment, and of the device.
        logs = run.step % run.scalars_every == 0 or run.step == run.end
        due = run.evaluator.is_due(run.step, run.end)
        if run.is_first and (logs or due):
            stats = run.statistics.note(run.step, run.images_seen, run.stream.wait_seconds, stats)

        # Hear what all ranks decided; on a GPU, some steps ago, unless this step waits for the device anyway.
        heard = _hear(run, reader, ring.push(run.step, stats))
        stops, saves = any(each.stop for each in heard), any(each.save for each in heard)
        if stops or due or run.step == run.end or run.checkpointer.is_due(run.step, epoch_ended, saves):
            heard += _hear(run, reader, ring.drain())
            stops, saves = any(each.stop for each in heard), any(each.save for each in heard)
        run.telemetry.progress(run.step)

        # Evaluate.
        results: Mapping[str, float] = {}
        if due and not stops:
            if run.standing is not None:
                run.standing.refresh()
            results = run.evaluator.evaluate(run.step, run.telemetry, lambda: _wants_stop(run))

        # Log what was heard.
        if run.is_first:
            _log(run, heard, results)
        run.statistics.exclude(results.get("evaluate/seconds", 0.0))

        # Sample.
        if run.step % run.samples_every == 0:
            _draw_samples(run)

        # Stop (which saves), or save.
        if stops:
            return _stop_reason(run)
        is_best = run.evaluator.best(run.step) is not None
        if run.checkpointer.is_due(run.step, epoch_ended, saves or is_best):
            _save(run, kept=run.checkpointer.is_permanent(epoch_ended))
    return None


def _draw_batches(run: Run) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Returns this rank's slice of the next d_steps batches, keyed by position: uint8 images, latents, other draws."""
    reals, latents, draws = [], [], []
    for k in range(run.d_steps):
        draw = (run.seed, run.images_seen + k * run.global_batch, run.global_batch)
        part = (run.lo, run.hi, run.world.device)
        real = run.stream.next()
        if run.x_flip:
            real = torch.where(draw_flips(*draw, *part)[:, None, None, None], real.flip(-1), real)
        elif k + 1 < run.d_steps:
            real = real.clone()  # the stream reuses its buffer at the following call
        reals.append(real)
        latents.append(draw_latents(*draw, run.latent_dim, *part, run.update.dtype))
        draws += run.update.draw(*draw[:2], run.stream.classes)
    return reals, latents, draws


def _hear(run: Run, reader: ControlReader, words: Sequence[Word]) -> list[Decision]:
    """Returns what the ranks decided with each step in `words`. Raises GanDistError when the weights have diverged."""
    decisions = []
    for word in words:
        decisions.append(decision := reader.read(word))
        if decision.skipped:
            run.telemetry.warn(f"step {decision.step}: an update was skipped, its gradients were not finite", run.step)
        if reader.diverged:
            raise GanDistError(
                f"the last {reader.skipped_in_a_row} steps up to {decision.step} had non-finite gradients and were "
                f"skipped; the last checkpoint is of step {run.checkpointer.saved_step}; "
                "lower optim.g_lr and optim.d_lr"
            )
    return decisions


def _wants_stop(run: Run) -> bool:
    """Returns whether this rank wants to stop; rank 0 checks the stop file and the time first."""
    if run.is_first:
        run.stop_watcher.check()
    return bool(run.stop)


def _stop_reason(run: Run) -> str:
    """Returns the reason for a stop as the console says it; the first rank's that has one. A collective."""
    reasons = [reason for reason in run.world.gather_objects(run.stop.reason) if reason]
    return reasons[0] if reasons else "another rank asked to stop"


def _await_first_batch(run: Run) -> bool:
    """Returns whether the first batch is there on every rank, however long it takes; False when asked to stop first."""
    try:
        with_heartbeat(run.world, run.stream.await_first, run.stop)
    except Cancelled:
        return False  # the loop sees to it before its first step
    return True


def _log(run: Run, heard: Sequence[Decision], results: Mapping[str, float]) -> None:
    """Writes the scalars of the steps that were noted, with the newest step's evaluation `results`, and what became of
    the last checkpoint; on rank 0 alone."""
    for decision in heard:
        more = results if decision.step == run.step else {}
        noted = run.statistics.compute(decision.step, decision.values, decision.skipped_so_far)
        if noted is None or not (more or decision.step % run.scalars_every == 0 or decision.step == run.end):
            continue  # an evaluation was due, but a stop came first
        images_seen, values = noted
        run.telemetry.scalars(decision.step, images_seen, {**values, **more})
        if failure := run.checkpointer.failure():
            going_on = "; training goes on"
            if isinstance(failure, GanDistError):  # it will not pass: the run is another's, or cannot be saved
                run.stop.ask(str(failure))
                going_on = ""
            run.telemetry.warn(f"a checkpoint could not be saved: {failure}{going_on}", run.step)


def _draw_samples(run: Run) -> None:
    """Draws the fixed latents' grid of this step, once; on rank 0 alone, in eval mode. Does not wait for a GPU."""
    if run.is_first and run.drawn_step != run.step:
        run.drawn_step = run.step
        if run.standing is not None:
            run.standing.refresh()
        run.gallery.draw(run.step)


def _introduce(run: Run) -> None:
    """Tells TensorBoard what is trained on what and where: texts, and the grid of real images."""
    if run.is_first:
        # Of a windowed set only the shards around this position are here.
        begin = run.images_seen if run.stream.placement == "windowed" else 0
        reals = gather(run.dataset, run.order.indices(begin, begin + min(run.grid, run.dataset.num_samples)))
        run.gallery.introduce(run.step, run.dataset, reals, run.config_yaml, run.facts)


def report(directory: Path, console: bool = True) -> None:
    """Makes report.html. A page that cannot be made is no reason to call a finished run failed.

    The group of ranks has ended before: a slow disk must not keep the others waiting.
    """
    try:
        make_report(directory, presets=presets())
    except (GanDistError, OSError) as error:
        if console:
            print(f"WARNING: no report was made: {error}", flush=True)


def _save(run: Run, *, kept: bool = False, wait: bool = False) -> None:
    """Saves this step, in the background unless `wait`. Every rank calls it: their states are compared first.

    Raises GanDistError, on every rank, when `wait` and it could not be saved.
    """
    began = time.monotonic()
    state = run.snapshot(run.checkpointer.previous_state())
    run.checkpointer.save(state, kept=kept, best=run.evaluator.best(run.step))
    if wait:
        run.checkpointer.wait()
    run.statistics.note_stall(time.monotonic() - began)

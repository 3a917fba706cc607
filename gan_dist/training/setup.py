"""A configuration made into a run: its dataset and place on disk, its networks and update, everything the loop uses."""

from __future__ import annotations

import math
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gan_dist.config.diff import flatten
from gan_dist.config.schema import Config, to_yaml
from gan_dist.data.classes import NO_CLASSES, Classes, Labels
from gan_dist.data.dataset import Dataset, open_dataset, open_remote
from gan_dist.data.order import Order, check_ranks, rank_slice
from gan_dist.data.placement import choose_placement, stage
from gan_dist.data.remote.fetch import redacted
from gan_dist.data.shards import check_resolution
from gan_dist.data.stream import Stream
from gan_dist.distributed.exchange import PLAIN, Collectives, resolve_collectives
from gan_dist.distributed.failures import device_may_hang, naming_lost_ranks
from gan_dist.distributed.heartbeat import with_heartbeat
from gan_dist.distributed.preflight import preflight
from gan_dist.distributed.world import World, join
from gan_dist.model.augment import Augment
from gan_dist.model.growth import grow
from gan_dist.model.initialise import initialise
from gan_dist.model.kernels import Kernels, resolve_kernels
from gan_dist.model.networks import build_discriminator, build_generator, layer_widths
from gan_dist.model.penalty import GradientPenalty
from gan_dist.runs.checkpoint import check_disk
from gan_dist.runs.lease import Lease, claim
from gan_dist.runs.run_dir import Start, changes_of_bits, prepare_start, write_start
from gan_dist.sampling.standing import Standing
from gan_dist.telemetry.gallery import Gallery
from gan_dist.telemetry.telemetry import Telemetry
from gan_dist.training.checkpointer import Checkpointer
from gan_dist.training.control import StopWatcher
from gan_dist.training.evaluator import Evaluator
from gan_dist.training.optim import EMA
from gan_dist.training.runner import Runner, make_runner, resolve_precision
from gan_dist.training.schedule import STILL, Beta2Ramp, Schedule
from gan_dist.training.statistics import StepStatistics
from gan_dist.training.torch_settings import resolve_deterministic, torch_settings
from gan_dist.training.update import Precision, Update, maps_dtype
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.files import is_address
from gan_dist.utils.progress import progress
from gan_dist.utils.stop import StopRequest
from gan_dist.utils.system import NETWORK, code_version, file_system
from gan_dist.utils.tensors import assert_ranks_agree, copy_state, state_digest


@dataclass
class Run:
    """One run on this rank: its parts, what the loop needs of its configuration, and where it stands."""

    directory: Path
    config: Mapping[str, Any]
    """The whole configuration as plain values, as checkpoints hold it."""
    config_yaml: str
    facts: Mapping[str, Any]
    """What environment.json says: software, hardware, dataset, parent, and what `auto` settings came to."""
    world: World
    dataset: Dataset
    classes: Classes
    order: Order
    stream: Stream
    update: Update
    runner: Runner
    ema: EMA | None
    standing: Standing | None
    """What draws instead of the average, where its statistics are to be its own."""
    checkpointer: Checkpointer
    evaluator: Evaluator
    telemetry: Telemetry
    statistics: StepStatistics
    gallery: Gallery
    stop: StopRequest
    stop_watcher: StopWatcher

    seed: int
    global_batch: int
    lo: int
    hi: int
    """This rank takes images [lo, hi) of every global batch."""
    d_steps: int
    latent_dim: int
    x_flip: bool
    scalars_every: int
    samples_every: int
    grid: int
    timeout_s: float

    end: int
    """The step at which the run is done."""
    step: int = 0
    images_seen: int = 0
    """The position of the data stream: all there is to know of where the data stands."""
    drawn_step: int = -1
    """The newest step whose samples were drawn."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.world.rank == 0

    def advance(self) -> bool:
        """Moves on by a step's images and returns whether an epoch ended in it."""
        epoch = self.images_seen // self.dataset.num_samples
        self.step += 1
        self.images_seen += self.d_steps * self.global_batch
        return self.images_seen // self.dataset.num_samples > epoch

    def snapshot(self, into: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Returns what a checkpoint holds: copies, made in the memory of an earlier snapshot `into` where it fits."""
        state = self.update.snapshot(into)
        if self.ema is not None:
            state["generator_ema"] = copy_state(self.ema.network.state_dict(), (into or {}).get("generator_ema"))
        counts = {"format": 1, "step": self.step, "images_seen": self.images_seen}
        classes = {"classes": self.classes.to_dict()} if self.classes.names else {}
        return {**counts, **state, **classes, "config": dict(self.config)}


@contextmanager
def open_run(
    directory: Path,
    config: Config,
    from_run: str | None,
    max_steps: int | None,
    stop: StopRequest,
    verbosity: int | None,
    command: Sequence[str],
) -> Iterator[Run]:
    """Yields the run that `trainer.train_in` is asked for, ready for its next step; leaves nothing running behind it.

    A collective: under torchrun every rank calls it.
    Raises UserError for bad input, before anything is written, and GanDistError for other expected failures: either
    has a message of one line.
    """
    if max_steps is not None and max_steps < 1:
        raise UserError(f"--max-steps: expected 1 or more, found {max_steps}")
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    limits = config.dist
    with join(config.train.device, limits.backend, limits.init_timeout_s, limits.timeout_s) as world:
        world.together(lambda: check_ranks(world.size, config.train.global_batch))
        try:
            with ExitStack() as opened:
                opened.enter_context(naming_lost_ranks(world, directory))
                precision, _ = resolve_precision(config.train.precision, world.device)
                deterministic = resolve_deterministic(config.train.deterministic, world.device)
                opened.enter_context(torch_settings(world.device, deterministic, precision))
                dataset, placement = open_for_training(config, world, stop, verbosity)
                opened.enter_context(dataset)
                labels, classes = None, NO_CLASSES
                if config.model.classes == "dataset":
                    at_once = placement != "windowed"  # else each window brings its own
                    labels = world.together(lambda: Labels.choose(dataset, config.model.classes_min_images, at_once))
                    classes = labels.classes

                # All ranks do the same: where a dataset lies may differ between hosts, what is asked may not.
                shared = {**flatten(config.to_dict()), "--max-steps": max_steps, "classes": classes.digest}
                del shared["data.shards"], shared["data.cache_dir"]
                warnings = preflight(world, dataset.identity, shared)

                # The directory is this trainer's alone, and holds nothing or an earlier part of the same run.
                def check() -> Start:
                    start = prepare_start(
                        directory,
                        config.to_dict(),
                        dataset.identity,
                        classes=classes,
                        from_run=from_run,
                        command=command,
                    )
                    return replace(start, notes=(*warnings, *start.notes))

                log = print if verbosity is not None else lambda line: None
                start, lease = opened.enter_context(claim(directory, world, check, log))
                yield opened.enter_context(
                    build_run(
                        config, world, dataset, labels, placement, directory, start, lease, max_steps, stop, verbosity
                    )
                )
        except (RuntimeError, MemoryError) as error:
            if explained := out_of_memory(error, config.train.global_batch, world.size):
                # The other GPUs wait in collectives that never come: an orderly end would wait with them.
                explained.exit_now = world.size > 1 and world.device.type == "cuda"
                raise explained from error
            raise


@contextmanager
def build_run(
    config: Config,
    world: World,
    dataset: Dataset,
    labels: Labels | None,
    placement: str,
    directory: Path,
    start: Start,
    lease: Lease | None,
    max_steps: int | None,
    stop: StopRequest,
    verbosity: int | None,
) -> Iterator[Run]:
    """Yields the parts of a run on a dataset that is open and in a directory that is ours."""
    # Where it stands: at its newest checkpoint, or at step 0 (with a parent's weights, if it has one).
    batch, per_step = config.train.global_batch, config.optim.d_steps * config.train.global_batch
    total_steps = math.ceil(math.ceil(config.train.epochs * dataset.num_samples) / per_step)
    step = images_seen = 0
    if start.loaded is not None and not start.fresh:
        step, images_seen = start.loaded.step, int(start.loaded.state["images_seen"])

    # The game: networks, update, average; the same on all ranks.
    classes = NO_CLASSES if labels is None else labels.classes
    precision, why_precision = resolve_precision(config.train.precision, world.device)
    kernels, why_kernels = resolve_kernels(
        config.train.batchnorm_kernels, world, maps_dtype(precision), config.loss.name, _layers_at_images(config)
    )
    collectives = resolve_collectives(world)
    update = build_update(config, world, precision, kernels, collectives, classes)
    runner = make_runner(config.train.runner, update)
    notes = [*start.notes]
    loaded = start.loaded
    if loaded is not None:
        if start.fresh and start.grown_from:
            state, lines = grow(loaded.state, update.networks(), config.model.resolution)
            loaded = replace(loaded, state=state)
            start = replace(start, loaded=loaded)
            notes += lines
        update.load_state_dict(loaded.state)
    ema = build_ema(config, update, start, classes)
    if world.size > 1:
        assert_ranks_agree(world.gather_objects(state_digest(update.snapshot(), config.train.sync_batchnorm)))
    drawing, standing = update.g.network if ema is None else ema.network, None
    if config.train.ema_statistics == "standing":
        standing = Standing(drawing, build_generator(config.model.model_dump(), classes))
        drawing = standing.network

    # Its place on disk.
    windowed = config.data.placement == "windowed" or (dataset.cache is not None and dataset.cache.windowed)
    evaluator = Evaluator(
        world,
        dataset,
        drawing,
        update.d.network,
        build_discriminator(config.model.model_dump(), classes).to(next(update.d.network.parameters())),
        directory / "checkpoints",
        every_steps=config.evaluate.every_steps,
        samples=config.evaluate.samples,
        images_per_step=per_step,
        latent_dim=config.model.latent_dim,
        averaged=ema is not None,
        complete=not windowed,
        encoder=config.evaluate.encoder,
        held_out=config.evaluate.held_out,
        cache_dir=config.data.cache_dir,
        log=notes.append,
    )
    resolved = {
        "device": world.device.type,
        "precision": precision,
        "runner": runner.name,
        "batchnorm_kernels": kernels,
        **({"collectives": collectives.reason} if collectives.reason else {}),
        "deterministic": resolve_deterministic(config.train.deterministic, world.device),
        "threads": torch.get_num_threads(),
        "ranks": world.size,
    }
    facts = {**environment(world), "dataset": dataset.identity, "parent": start.parent, "resolved": resolved}
    facts |= {"grown_from": start.grown_from} if start.grown_from else {}
    notes += [] if start.fresh else changes_of_bits(directory, facts)
    world.from_first(lambda: check_disk(directory, update.snapshot()))
    world.from_first(lambda: write_start(directory, to_yaml(config), facts))

    with ExitStack() as closing:
        closing.push(lambda kind, error, trace: runner.close(orderly=error is None))
        # What it logs, what it saves, what it learns from: opened in this order, closed in reverse.
        telemetry = Telemetry(
            directory,
            active=world.rank == 0,
            step=step,
            total_steps=(end := min(total_steps, max_steps or total_steps)),
            console=verbosity is not None and world.rank == 0,
            verbosity=verbosity or 0,
            timeout_s=config.dist.timeout_s,
        )
        closing.callback(telemetry.close)

        def before_publishing() -> None:
            telemetry.flush()  # what was logged up to this step is on the disk
            if lease is not None:
                lease.check()

        checkpointer = Checkpointer(
            directory / "checkpoints",
            world,
            keep=config.checkpoint.keep,
            every_steps=config.checkpoint.every_steps,
            every_minutes=config.checkpoint.every_minutes,
            keep_epochs=config.checkpoint.keep_epochs,
            saved_step=-1 if start.fresh else step,
            synchronised=config.train.sync_batchnorm,
            facts={
                key: facts[key] for key in ("dataset", "parent", "grown_from", "torch", "world_size") if key in facts
            },
            before_publishing=before_publishing,
            timeout_s=config.dist.timeout_s,
        )
        closing.callback(lambda: checkpointer.failure(wait=True))
        order = Order(dataset.shard_sizes, config.seed, config.data.window_shards)
        stream = closing.enter_context(
            Stream(
                dataset,
                order,
                position=images_seen,
                global_batch=batch,
                rank=world.rank,
                size=world.size,
                device=world.device,
                placement=placement,
                labels=labels,
            )
        )
        lo, hi = rank_slice(batch, world.rank, world.size)
        seconds, source = config.train.stop_after_minutes, torch.Generator().manual_seed(config.seed)
        fixed_latents = torch.randn(config.log.grid, config.model.latent_dim, generator=source)
        run = Run(
            directory=directory,
            config=config.to_dict(),
            config_yaml=to_yaml(config),
            facts=facts,
            world=world,
            dataset=dataset,
            classes=classes,
            order=order,
            stream=stream,
            update=update,
            runner=runner,
            ema=ema,
            standing=standing,
            checkpointer=checkpointer,
            evaluator=evaluator,
            telemetry=telemetry,
            statistics=StepStatistics(update, dataset.num_samples),
            gallery=Gallery(directory, telemetry, drawing, fixed_latents),
            stop=stop,
            stop_watcher=StopWatcher(stop, directory, time.monotonic() + 60 * seconds if seconds else None),
            seed=config.seed,
            global_batch=batch,
            lo=lo,
            hi=hi,
            d_steps=config.optim.d_steps,
            latent_dim=config.model.latent_dim,
            x_flip=config.data.x_flip,
            scalars_every=config.log.scalars_every,
            samples_every=config.log.samples_every,
            grid=config.log.grid,
            timeout_s=config.dist.timeout_s,
            end=end,
            step=step,
            images_seen=images_seen,
        )
        choices: tuple[str, ...] = (
            f"precision {precision}: {why_precision}",
            f"batch norm by {kernels}: {why_kernels}",
        )
        choices += (f"collectives: {collectives.reason}",) if collectives.reason else ()
        _announce(run, total_steps, config.train.epochs, choices, notes)
        try:
            yield run
        except Exception as error:
            if device_may_hang(world, error):
                closing.pop_all()  # all but this would wait for the device
                telemetry.close(orderly=False)
            raise


def _announce(run: Run, total_steps: int, epochs: float, choices: Sequence[str], notes: Sequence[str]) -> None:
    """Says on the console, and in the run's history, what starts here and from where."""
    verb, world = "continues" if run.step else "starts", run.world
    names, images = run.classes.names, run.classes.images
    kernels = "deterministic kernels; " if run.facts["resolved"]["deterministic"] else ""
    if world.device.type == "cuda" and not kernels:
        kernels = "kernels that need not repeat their bits; "
    for line in (
        f"{run.directory.name} {verb} at step {run.step} of {run.end}: {run.dataset.num_samples} images, "
        f"batch {run.global_batch} over {world.size} rank(s) on {world.device.type}",
        f"{epochs:g} epochs at batch {run.global_batch} are {total_steps:,} updates of G, "
        f"{total_steps * run.d_steps:,} of D; learning rates are as set, whatever the batch",
        *choices,
        *([f"{len(names):,} classes; {images[0]:,} images count as unlabelled"] if names else []),
        f"runner {run.runner.name}: {run.runner.reason}; {kernels}samples in {run.stream.placement}",
        *(f"note: {note}" for note in notes),
    ):
        run.telemetry.log(line)
    where = {"world_size": world.size, "device": world.device.type, "parent": run.facts["parent"]}
    run.telemetry.event("start", run.step, **where, notes=notes)


def open_for_training(config: Config, world: World, stop: StopRequest, verbosity: int | None) -> tuple[Dataset, str]:
    """Returns the dataset, checked against what the run asks of it and staged where it can be read at random, and the
    placement that was chosen for it; a collective. `stop` ends it while remote data are fetched."""
    data, remote = config.data, is_address(config.data.shards)
    prefix = f"rank {world.rank}: " if world.size > 1 else ""

    def log(line: str) -> None:
        if verbosity is not None:
            print(f"note: {prefix}{line}", flush=True)

    def open_and_stage(cancelled: Callable[[], bool]) -> tuple[Dataset, str]:
        if remote:
            windows = data.window_shards if data.placement in ("auto", "windowed") else 0
            dataset = open_remote(data.shards, data.cache_dir, window_shards=windows, cancelled=cancelled, log=log)
        else:
            dataset = open_dataset(data.shards)
        try:
            verbose = verbosity is not None and verbosity >= 0 and world.rank == 0
            return dataset, _stage(dataset, config, world, verbose, lambda: cancelled() or bool(stop))
        except BaseException:
            dataset.close()
            raise

    # Local data need no staging: a stop then waits for the first step, which saves.
    return with_heartbeat(world, open_and_stage, stop if remote else StopRequest())


def _stage(dataset: Dataset, config: Config, world: World, verbose: bool, cancelled: Callable[[], bool]) -> str:
    """Stages the dataset, so that it can be read at random, and returns its placement."""
    check_resolution(config.model.resolution, dataset.resolution, redacted(config.data.shards))
    placement = choose_placement(config.data.placement, dataset, world.device, config.data.window_shards)

    def log(line: str) -> None:
        if verbose:
            print(line, flush=True)

    if dataset.cache is not None:
        what = f"{config.data.window_shards} shards at a time" if placement == "windowed" else "as a whole"
        log(f"{redacted(config.data.shards)} is staged in {dataset.root}, {what}")
    elif verbose and placement != "device" and NETWORK.search(kind := file_system(dataset.root)):
        log(f"note: the samples lie on {kind}; data.shards=file://{dataset.root} brings them here first")
    if (batch := config.train.global_batch) > dataset.num_samples:
        log(f"note: train.global_batch is {batch}, the dataset has {dataset.num_samples} images: batches repeat some")
    with progress(shown=verbose, in_bytes=True) as show:
        warning = stage(dataset, placement, first=world.local_rank == 0, progress=show, cancelled=cancelled)
    if warning:
        log(f"note: {warning}")
    return placement


def _layers_at_images(config: Config) -> dict[str, Any] | None:
    """Returns what describes the layers between images and maps, for the check of their kernels; None where a penalty
    differentiates gradients, which kernels' are not made for."""
    if build_penalty(config).differentiates_twice:
        return None
    model = config.model
    g_channels, d_channels = (
        layer_widths(model.resolution, narrowest, model.max_channels)[-1]
        for narrowest in (model.g_channels, model.d_channels)
    )
    return {
        "side": model.resolution,
        "g_channels": g_channels,
        "d_channels": d_channels,
        "slope": model.leaky_slope,
        "biased": model.d_norm != "batch",
    }


def build_update(
    config: Config,
    world: World,
    precision: Precision,
    kernels: Kernels = "torch",
    collectives: Collectives = PLAIN,
    classes: Classes = NO_CLASSES,
) -> Update:
    """Returns the update of freshly initialised networks, on the world's device in the (resolved) precision.

    Weights are drawn from `config.seed` on the CPU, so that they are alike on every device.
    """
    model, optim, source = config.model, config.optim, torch.Generator().manual_seed(config.seed)
    described = model.model_dump()
    generator, discriminator = build_generator(described, classes), build_discriminator(described, classes)
    for network in (generator, discriminator):
        initialise(network, model.init_std, source, model.init)
    return Update(
        generator,
        discriminator,
        world=world,
        global_batch=config.train.global_batch,
        loss=config.loss.name,
        real_target=config.loss.real_target,
        generator_target=config.loss.generator_target,
        penalty=build_penalty(config),
        augment=Augment(**config.data.augment.model_dump()),
        g_lr=optim.g_lr,
        d_lr=optim.d_lr,
        g_betas=optim.g_betas or optim.betas,
        d_betas=optim.d_betas or optim.betas,
        schedule=Schedule(optim.warmup_images, optim.decay, optim.decay_images, optim.decay_to),
        beta2_ramp=STILL if optim.beta2_to is None else Beta2Ramp(optim.beta2_to, optim.beta2_images),
        d_steps=optim.d_steps,
        precision=precision,
        sync_batchnorm=config.train.sync_batchnorm,
        batchnorm_kernels=kernels,
        collectives=collectives,
    )


def build_penalty(config: Config) -> GradientPenalty:
    """Returns the gradient penalty that the configuration asks for."""
    chosen = config.loss.gradient_penalty
    kinds = (1 if chosen.on == "real" else 2) if chosen.weight else 0
    return GradientPenalty(chosen.weight, chosen.sigma, kinds, chosen.every, chosen.method)


def build_ema(config: Config, update: Update, start: Start, classes: Classes = NO_CLASSES) -> EMA | None:
    """Returns the averaged generator that the configuration asks for, as it was where the run starts, or None."""
    half_life = config.train.ema_half_life_images
    if half_life == 0:
        return None
    per_step = config.optim.d_steps * config.train.global_batch
    # A run that began with another's weights has no meaningless first ones to forget, but for those that grew.
    ramp = start.parent is None or start.grown_from is not None
    twin = build_generator(config.model.model_dump(), classes)
    ema = EMA(update.g.network, twin, half_life, per_step, ramp=ramp)
    if start.loaded is not None and "generator_ema" in start.loaded.state:
        ema.network.load_state_dict(start.loaded.state["generator_ema"])
    return ema


def environment(world: World) -> dict[str, Any]:
    """Returns what a run's environment.json says of the software, the hardware and the world it runs in."""
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "gan_dist": code_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else _processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": world.size,
        "command": sys.argv,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def out_of_memory(error: BaseException, global_batch: int, ranks: int) -> GanDistError | None:
    """Returns the one line that answers an out-of-memory error of device or host, or None for any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        where = "the GPU"
    elif isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "not enough memory" in str(error):
        where = "this machine"
    else:
        return None
    return GanDistError(
        f"{where} is out of memory with train.global_batch={global_batch} on {ranks} rank(s); "
        "lower train.global_batch, model.g_channels or model.d_channels, or use more ranks"
    )

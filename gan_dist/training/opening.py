"""The dataset of a run: found, checked against the configuration, and brought to where it can be read at random."""

from __future__ import annotations

from collections.abc import Callable

from gan_dist.config.schema import Config
from gan_dist.data.remote.cache import open_remote
from gan_dist.data.remote.fetch import shown
from gan_dist.data.shards import Dataset, open_dataset
from gan_dist.data.stream import choose_placement, stage
from gan_dist.distributed.heartbeat import with_heartbeat
from gan_dist.distributed.world import World
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import is_address
from gan_dist.utils.places import NETWORK, file_system
from gan_dist.utils.progress import transfers
from gan_dist.utils.stop import StopRequest


def open_for(config: Config, world: World, stop: StopRequest, voice: int | None) -> Dataset:
    """Returns the dataset, checked against what the run asks of it, and ready to be read; a collective."""
    data, remote = config.data, is_address(config.data.shards)

    def open_and_stage(cancelled: Callable[[], bool]) -> Dataset:
        if world.size > config.train.global_batch:
            raise UserError(
                f"{world.size} ranks, but train.global_batch is {config.train.global_batch}: each rank needs an image; "
                "start fewer ranks or raise train.global_batch"
            )
        if remote:
            windows = data.window_shards if data.placement in ("auto", "windowed") else 0
            dataset = open_remote(
                data.shards, data.cache_dir, window_shards=windows, cancelled=cancelled, say=_teller(world, voice)
            )
        else:
            dataset = open_dataset(data.shards)
        try:
            _make_ready(dataset, config, world, voice, lambda: cancelled() or bool(stop))
        except BaseException:
            dataset.close()
            raise
        return dataset

    # What lies here needs no staging: a stop then waits for the first step, which saves.
    return with_heartbeat(world, open_and_stage, stop if remote else StopRequest())


def _make_ready(
    dataset: Dataset, config: Config, world: World, voice: int | None, cancelled: Callable[[], bool]
) -> None:
    if dataset.resolution != config.model.resolution:
        raise UserError(
            f"model.resolution is {config.model.resolution}, but {config.data.shards} holds {dataset.resolution}x"
            f"{dataset.resolution} images; set model.resolution={dataset.resolution} or prepare the set again"
        )
    placement = choose_placement(config.data.placement, dataset, world.device, config.data.window_shards)
    spoken = voice is not None and voice >= 0 and world.rank == 0
    if dataset.cache is not None and spoken:
        what = f"{config.data.window_shards} shards at a time" if placement == "windowed" else "as a whole"
        print(f"{shown(config.data.shards)} is staged in {dataset.root}, {what}", flush=True)
    elif spoken and placement != "device" and NETWORK.search(kind := file_system(dataset.root)):
        print(f"note: the samples lie on {kind}; data.shards=file://{dataset.root} brings them here first", flush=True)
    if spoken and (batch := config.train.global_batch) > dataset.num_samples:
        print(f"note: train.global_batch is {batch}, the dataset has {dataset.num_samples} images: batches repeat some")
    with transfers(spoken) as progress:
        warning = stage(dataset, placement, first=world.local_rank == 0, progress=progress, cancelled=cancelled)
    if warning and spoken:
        print(f"note: {warning}", flush=True)


def _teller(world: World, voice: int | None) -> Callable[[str], None]:
    """Returns what prints a rank's warnings."""
    prefix = f"rank {world.rank}: " if world.size > 1 else ""
    return lambda line: print(f"note: {prefix}{line}", flush=True) if voice is not None else None

"""Where the samples of a dataset wait, and getting them there before training starts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gan_dist.data.dataset import Dataset
from gan_dist.utils.errors import UserError
from gan_dist.utils.stop import never_cancelled
from gan_dist.utils.system import available_memory

DEVICE_SHARE = 0.25
"""Share of a GPU's free memory that the dataset may take; the networks and the caching allocator need the rest."""
HOST_SHARE = 0.5
"""Share of the available memory that a dataset may fill as page cache before `auto` prefers windows."""


def choose_placement(placement: str, dataset: Dataset, device: torch.device, window_shards: int = 0) -> str:
    """Returns the placement that `placement` (data.placement) means here.

    `auto` is `device` when the set fits into its share of a GPU's memory, else `windowed` when there are windows and
    the set is remote or larger than memory, else `memory`.

    Raises:
        UserError: the placement is impossible here.
    """
    size = dataset.num_samples * 3 * dataset.resolution**2
    if placement == "windowed" and not window_shards:
        raise UserError("data.placement=windowed needs data.window_shards of 1 or more, which is part of a run's order")
    if placement == "device" and device.type != "cuda":
        raise UserError("data.placement=device keeps the set in GPU memory, but training is on the CPU; use memory")
    if placement == "windowed" or (dataset.cache is not None and dataset.cache.windowed):
        return "windowed"
    if placement in ("device", "auto") and device.type == "cuda":
        room = DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
        if size <= room:
            return "device"
        if placement == "device":
            raise UserError(
                f"data.placement=device needs {size / 2**30:.1f} GiB of GPU memory, a quarter of what is free is "
                f"{room / 2**30:.1f} GiB; use data.placement=memory"
            )
    if placement == "auto" and window_shards and size > HOST_SHARE * available_memory():
        return "windowed"
    return "memory"


def stage(
    dataset: Dataset,
    placement: str,
    *,
    first: bool = True,
    progress: Callable[[str, int, int], None] = lambda verb, done, total: None,
    cancelled: Callable[[], bool] = never_cancelled,
) -> str | None:
    """Returns a warning when the dataset is larger than memory, else None, having made it ready for random access.

    A remote one is fetched to this machine. Then the `first` rank of each machine reads it once from end to end, unless
    that is cancelled. With windows nothing is done: each is made ready in its turn. `progress` is called with what is
    done (staging or reading), the bytes done and the bytes in all.

    Raises:
        UserError: a shard is damaged.
    """
    if placement == "windowed":
        return None
    if dataset.cache is not None:
        dataset.cache.fetch_all(lambda done, total: progress("staging", done, total), cancelled)
    total = sum(shard.bytes for shard in dataset.manifest.shards)
    done = 0
    if total > (memory := available_memory()):  # its end would displace its beginning: nothing would be warm
        return (
            f"the samples take {total / 2**30:.1f} GiB, and {memory / 2**30:.1f} GiB of memory are available: reads "
            "will wait for the disk; a new run with data.window_shards reads ahead instead"
        )
    for i, shard in enumerate(dataset.manifest.shards if first else ()):
        if cancelled():
            break
        dataset.warm(i, cancelled)
        done += shard.bytes
        progress("reading", done, total)
    return None

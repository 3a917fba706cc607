"""Distributed DCGAN training: shards, streams and one synchronised game on any number of ranks.

The library: `prepare` sources into a dataset, `train` a run on it, `open_dataset`, `load_generator`. Each is imported
at its first use, so that `import gan_dist` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gan_dist.data.dataset import open_dataset
    from gan_dist.data.prepare.prepare import prepare
    from gan_dist.sampling.generate import load_generator
    from gan_dist.training.trainer import train

__all__ = ["load_generator", "open_dataset", "prepare", "train"]
_HOMES = {
    "prepare": "gan_dist.data.prepare.prepare",
    "train": "gan_dist.training.trainer",
    "open_dataset": "gan_dist.data.dataset",
    "load_generator": "gan_dist.sampling.generate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gan_dist' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

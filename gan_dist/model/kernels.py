"""Whose kernels a game is played with: torch's, or ours for GPUs, where they can be built and are right."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch

from gan_dist.config.schema import LossName
from gan_dist.distributed.world import World
from gan_dist.utils.errors import UserError, first_line

Kernels = Literal["torch", "triton"]


def resolve_kernels(
    name: str,
    world: World,
    dtype: torch.dtype,
    loss: LossName = "non_saturating",
    images: Mapping[str, Any] | None = MappingProxyType({}),
) -> tuple[Kernels, str]:
    """Returns the Kernels that `name` (one of them, or auto) means here, and why in one clause.

    auto: triton on a GPU where they can be built and give the results of torch's, on every rank; else torch. The same
    goes for the kernel of the game's `loss` (losses_triton.py) and, in bfloat16, for those of the layers between images
    and maps (image_layers_triton.py): all or none. A collective: every rank calls it.
    `dtype`: the maps', bfloat16 under autocast; `images`: what that module's `check` takes, None for a game whose
    gradients are differentiated, which these layers' are not.
    Raises UserError for triton where it cannot be, and for another name.
    """
    if name not in ("auto", *get_args(Kernels)):
        raise UserError(f"train.batchnorm_kernels: expected auto, {', '.join(get_args(Kernels))}, found {name!r}")
    if name == "torch":
        return "torch", "set by train.batchnorm_kernels"
    if dtype != torch.bfloat16:
        images = None
    if world.device.type != "cuda":
        if name == "triton":
            raise UserError(
                f"train.batchnorm_kernels=triton is for GPUs, but this rank drives {world.device.type}; use auto"
            )
        return "torch", f"Triton's are for GPUs, and this rank drives {world.device.type}"
    failure = ""
    try:
        import_module("gan_dist.model.batchnorm_triton").check(world.device, dtype)
        if images is not None:
            import_module("gan_dist.model.image_layers_triton").check(world.device, **images)
        # Logits have the maps' dtype, or that of what is added to them: a bias, a class's part.
        for logits in dict.fromkeys((dtype, torch.promote_types(dtype, torch.float32))):
            import_module("gan_dist.model.losses_triton").check(world.device, logits, loss)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no C compiler, a driver too old for it, wrong results: all mean one thing
        failure = f"{type(error).__name__}: {first_line(error)}"
    failures = {rank: text for rank, text in enumerate(world.gather_objects(failure)) if text}
    if not failures:
        others = "losses" if images is None else "losses and the layers at images"
        fused = f"fused with the activation; {others} have kernels too"
        return "triton", fused if name == "auto" else "set by train.batchnorm_kernels"
    rank, text = next(iter(failures.items()))
    told = f"Triton's kernels fail on rank {rank} ({text})"
    if name == "triton":
        raise UserError(f"train.batchnorm_kernels=triton, but {told}; use auto, or torch")
    return "torch", told

"""Figures of a run's health that are worth computing only when a log is due."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from torch import Tensor


def update_ratio(optimizer: torch.optim.Adam) -> Tensor:
    """Returns the norm of Adam's newest update over the norm of the weights, a float32 scalar on their device.

    Computed from Adam's moments (Kingma and Ba 2015, algorithm 1), so nothing need be kept from before the step,
    however that was executed. 0 before the first step. About 1e-3 is healthy; 1e-1 tears the network up.
    """
    updates, weights = [], []
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if not state:
                continue
            step = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device).clamp(min=1)
            mean = state["exp_avg"] / (1 - beta1**step)
            root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"]
            updates.append(torch.linalg.vector_norm(group["lr"] * mean / root))
            weights.append(torch.linalg.vector_norm(parameter.detach()))
    if not updates:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(torch.stack(each)) for each in (updates, weights)]
    ratio: Tensor = norms[0] / norms[1].clamp(min=1e-12)
    return ratio.float()


def code_version() -> str | None:
    """Returns the commit that gan_dist runs from, with `-dirty` where files differ from it; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        told = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip() or None

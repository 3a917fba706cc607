"""Adam (Kingma and Ba 2015) whose second decay rate moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RampedAdam(torch.optim.Adam):
    """Adam whose second decay rate is a scalar on the device, which a CUDA graph reads anew at each replay.

    The step is what torch's computes when its betas are set anew before it, and nothing where `found_inf` is not 0.
    torch's fused one takes this rate as a number of the host.
    """

    beta2: Tensor
    found_inf: Tensor

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates the parameters by their gradients."""
        (group,) = self.param_groups
        parameters = group["params"]
        states = [self.state[parameter] for parameter in parameters]
        means, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        done = 1 - self.found_inf
        # Gradients of a skipped update may be anything; the weights of all that follows are 0 then.
        gradients = [torch.where(done != 0, parameter.grad, 0.0) for parameter in parameters]
        torch._foreach_add_(steps, [done] * len(steps))
        dtype, beta1 = parameters[0].dtype, group["betas"][0]
        done, beta2, count = (value.to(dtype) for value in (done, self.beta2, steps[0].clamp(min=1)))
        for moments, values, decay in (
            (means, gradients, beta1),
            (squares, torch._foreach_mul(gradients, gradients), beta2),
        ):
            weight = (1 - decay) * done
            torch._foreach_mul_(moments, 1 - weight)
            torch._foreach_add_(moments, torch._foreach_mul(values, weight))
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - beta2**count).sqrt())
        torch._foreach_add_(roots, group["eps"])
        moves = torch._foreach_div(means, roots)
        torch._foreach_mul_(moves, group["lr"] / (1 - beta1**count) * done)
        torch._foreach_sub_(parameters, moves)

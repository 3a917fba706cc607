"""Standing statistics (Brock et al. 2019, arXiv:1809.11096, section 4): batch norm's, estimated for given weights.

Running statistics follow the weights that train, with a delay. Averaged weights are other weights: their maps have
other means and variances, so that a generator which normalises by the average of old statistics draws worse than its
weights can. Here statistics are measured on the very weights that are to draw, over latents that never change.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gan_dist.model.batchnorm import BatchNorm
from gan_dist.model.networks import Generator

NUM_LATENTS, BATCH = 1024, 256
SEED = 0x57A7
"""Keys the latents. They are drawn on the CPU: the same everywhere."""


def fixed_inputs(generator: Generator) -> tuple[Tensor, Tensor | None]:
    """Returns the latents, float32 [NUM_LATENTS, Z], and in a game with classes their labels, int64; on the generator's
    device."""
    device = next(generator.parameters()).device
    latents = torch.randn(NUM_LATENTS, generator.latent_dim, generator=torch.Generator().manual_seed(SEED))
    labels = generator.classes.draw(NUM_LATENTS, SEED).to(device) if generator.num_classes else None
    return latents.to(device), labels


@torch.no_grad()
def estimate_statistics(
    generator: Generator, scale: float = 1.0, inputs: tuple[Tensor, Tensor | None] | None = None
) -> None:
    """Replaces the running statistics of `generator`, in place, by those of NUM_LATENTS fixed latents times `scale`.

    Means and variances of BATCH images each, normalised as in training, are averaged; classes are as frequent as in the
    dataset. No collective and no random state is used: equal weights get equal statistics on any rank. The
    generator's mode stays. `inputs`: what `fixed_inputs` returned; with them it does not wait for a GPU.
    """
    dtype = next(generator.parameters()).dtype
    latents, labels = inputs or fixed_inputs(generator)
    latents = latents * scale
    if labels is not None:
        latents = generator.with_classes(latents, labels)
    layers = [layer for layer in generator.modules() if isinstance(layer, BatchNorm)]
    kept = [(layer.momentum, layer.process_group, layer.fused) for layer in layers]
    training = generator.training
    generator.train()
    try:
        for turn, some in enumerate(torch.split(latents, BATCH), start=1):
            for layer in layers:
                layer.momentum, layer.process_group, layer.fused = 1 / turn, None, None  # the mean of all turns so far
            generator(some.to(dtype))
    finally:
        for layer, values in zip(layers, kept, strict=True):
            layer.momentum, layer.process_group, layer.fused = values
        generator.train(training)


class Standing:
    """A twin of a generator, with statistics of its own; neither the generator nor its statistics change."""

    def __init__(self, source: nn.Module, twin: Generator) -> None:
        parameter = next(source.parameters())
        self._source = source
        self.network = twin.to(device=parameter.device, dtype=parameter.dtype).to(memory_format=torch.channels_last)
        self.network.eval().requires_grad_(False)
        self._inputs = fixed_inputs(self.network)

    def refresh(self) -> None:
        """Takes over the generator's weights as they are now, and estimates their statistics."""
        self.network.load_state_dict(self._source.state_dict())
        estimate_statistics(self.network, inputs=self._inputs)

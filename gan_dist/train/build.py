"""A configuration's players: both networks from the seed, and the update they play."""

from __future__ import annotations

import torch

from gan_dist.config import Config
from gan_dist.distributed import World
from gan_dist.model.networks import Discriminator, Generator, initialise
from gan_dist.train.update import Precision, Update


def build_update(config: Config, world: World, precision: Precision) -> Update:
    """Returns the update of freshly initialised networks, on the world's device in the (resolved) precision.

    Weights are drawn from `config.seed` on the CPU, so that they are alike on every device.
    """
    model, source = config.model, torch.Generator().manual_seed(config.seed)
    generator = Generator(model.resolution, model.latent_dim, model.g_channels)
    discriminator = Discriminator(model.resolution, model.d_channels, model.leaky_slope)
    for network in (generator, discriminator):
        initialise(network, model.init_std, source)
    return Update(
        generator,
        discriminator,
        world=world,
        global_batch=config.train.global_batch,
        loss=config.loss.name,
        real_target=config.loss.real_target,
        generator_target=config.loss.generator_target,
        g_lr=config.optim.g_lr,
        d_lr=config.optim.d_lr,
        betas=config.optim.betas,
        d_steps=config.optim.d_steps,
        precision=precision,
        sync_batchnorm=config.train.sync_batchnorm,
    )

"""A configuration's players: both networks from the seed, and the update they play."""

from __future__ import annotations

import torch

from gan_dist.config.schema import Config
from gan_dist.distributed.world import World
from gan_dist.model.networks import Discriminator, Generator, initialise
from gan_dist.runs.run_dir import Start
from gan_dist.training.ema import Average
from gan_dist.training.update import Precision, Update


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


def build_average(config: Config, update: Update, start: Start) -> Average | None:
    """Returns the averaged generator that the configuration asks for, as it was where the run starts, or None."""
    half_life, model = config.train.ema_half_life_images, config.model
    if half_life == 0:
        return None
    twin = Generator(model.resolution, model.latent_dim, model.g_channels)
    per_step = config.optim.d_steps * config.train.global_batch
    # A run that began with another's weights has no meaningless first ones to forget.
    average = Average(update.g.network, twin, half_life, per_step, ramp=start.parent is None)
    if start.loaded is not None and "generator_ema" in start.loaded.state:
        average.network.load_state_dict(start.loaded.state["generator_ema"])
    return average

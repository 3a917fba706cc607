"""What watching costs beside a step, in the processor's own seconds, so that a busy machine does not blur it.

At 64x64 and the paper's widths, with an eighth of the default batch (128): 0.6% of such a step on one AMD EPYC core of
a busy machine, so 0.08% of a whole one. More than 8% here, 1% of a whole step, would be too much.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from gan_dist.distributed.world import World
from gan_dist.model.initialise import initialise
from gan_dist.model.networks import Discriminator, Generator
from gan_dist.telemetry.gallery import Gallery
from gan_dist.telemetry.telemetry import Telemetry
from gan_dist.training.statistics import update_ratio
from gan_dist.training.update import STATS, Update

SCALARS_EVERY, SAMPLES_EVERY, GRID = 50, 200, 64
"""The defaults of the configuration."""


def main(folder: Path) -> None:
    source = torch.Generator().manual_seed(0)
    generator, discriminator = Generator(64, 100, 64), Discriminator(64, 64)
    for network in (generator, discriminator):
        initialise(network, 0.02, source)
    batch = 16
    update = Update(generator, discriminator, world=World(device=torch.device("cpu")), global_batch=batch)
    reals = torch.randint(0, 256, (batch, 3, 64, 64), generator=source, dtype=torch.uint8)
    stats = update.step([reals], [torch.randn(batch, 100)])
    telemetry = Telemetry(folder, active=True, step=0, total_steps=10_000)
    gallery = Gallery(folder, telemetry, generator, torch.randn(GRID, 100))
    gallery.draw(0)
    telemetry.flush()

    began = time.process_time()
    for _ in range(4):
        stats = update.step([reals], [torch.randn(batch, 100)])
    step_seconds = (time.process_time() - began) / 4

    began = time.process_time()
    for step in range(1, SAMPLES_EVERY + 1):
        telemetry.progress(step)
        if step % SCALARS_EVERY == 0:
            values = dict(zip(STATS, stats.tolist(), strict=True))
            values["update_ratio/generator"] = update_ratio(update.g.optimizer).item()
            values["update_ratio/discriminator"] = update_ratio(update.d.optimizer).item()
            telemetry.scalars(step, step * batch, values)
    gallery.draw(SAMPLES_EVERY)
    telemetry.flush()
    watch_seconds = (time.process_time() - began) / SAMPLES_EVERY
    telemetry.close()
    share = watch_seconds / step_seconds
    print(f"a step {1e3 * step_seconds:.1f} ms, watching it {1e3 * watch_seconds:.3f} ms: {share:.3%}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        main(Path(directory))

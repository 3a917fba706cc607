"""Small runs for the tests of watching: real networks in a real game, told by the real telemetry, no trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from gan_dist.data.dataset import Dataset, gather
from gan_dist.distributed.world import World
from gan_dist.model.initialise import initialise
from gan_dist.model.networks import Discriminator, Generator
from gan_dist.telemetry.gallery import Gallery
from gan_dist.telemetry.telemetry import Telemetry
from gan_dist.training.draws import draw_latents
from gan_dist.training.statistics import update_ratio
from gan_dist.training.update import STATS, Update

BATCH, LATENT = 4, 8


class Game:
    """A run of `total` steps in `run_dir`; a `play` without a last word leaves its files as a kill would."""

    def __init__(self, run_dir: Path, dataset: Dataset, total: int = 12, **told: Any) -> None:
        self.run_dir, self.dataset, self.total, self.told = run_dir, dataset, total, told
        run_dir.mkdir(exist_ok=True)
        source = torch.Generator().manual_seed(0)
        generator, discriminator = Generator(32, LATENT, 4), Discriminator(32, 4)
        for network in (generator, discriminator):
            initialise(network, 0.02, source)
        self.update = Update(generator, discriminator, world=World(device=torch.device("cpu")), global_batch=BATCH)
        self.config = {
            "seed": 0,
            "data": {"shards": str(dataset.root)},
            "model": {"resolution": 32, "latent_dim": LATENT, "g_channels": 4, "d_channels": 4},
            "train": {"global_batch": BATCH},
        }
        (run_dir / "config.yaml").write_text(yaml.safe_dump(self.config))
        (run_dir / "environment.json").write_text(json.dumps({"host": "here", "command": ["gan-dist", "train", "x"]}))

    def play(self, start: int, stop: int, *, last_word: str | None = None) -> None:
        """Plays steps start + 1 to stop, as resumed from a checkpoint at `start`; without `last_word`, as if killed."""
        telemetry = Telemetry(self.run_dir, active=True, step=start, total_steps=self.total, console=False, **self.told)
        gallery = Gallery(self.run_dir, telemetry, self.update.g.network, torch.randn(9, LATENT))
        reals = gather(self.dataset, torch.arange(9).numpy())
        telemetry.event("start", start, world_size=1, device="cpu")
        gallery.introduce(start, self.dataset, reals, "seed: 0", {"host": "here"})
        if start == 0:
            gallery.draw(0)
        for step in range(start + 1, stop + 1):
            z = draw_latents(0, step, BATCH, LATENT, 0, BATCH, torch.device("cpu"))
            stats = self.update.step([reals[:BATCH]], [z]).tolist()
            telemetry.progress(step)
            values = {tag: value for tag, value in zip(STATS, stats, strict=True) if not tag.startswith("control/")}
            values["update_ratio/generator"] = float(update_ratio(self.update.g.optimizer))
            values["throughput/images_per_second"] = 100.0
            values["progress/epoch"] = step * BATCH / self.dataset.num_samples
            telemetry.scalars(step, step * BATCH, values)
            if step % 3 == 0:
                gallery.draw(step)
        if last_word:
            telemetry.event(last_word, stop, reason="SIGTERM" if last_word == "stop" else None)
            telemetry.close()
        else:
            telemetry.flush()  # all that was told has reached the disk, and then the power went: no last words
            telemetry._metrics.close()
            telemetry._encoder.shutdown()
            assert telemetry._board is not None
            telemetry._board.close()

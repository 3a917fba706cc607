"""Time, arithmetic and memory of a step at 64, 128 and 256 pixels: python -m tests.bench.compare_sizes

Each game in a process of its own, whose peak memory is told. Time is that of the CPU, on one thread, so that other
programs on the machine hardly enter it. Real images are noise.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from gan_dist.bench.step import work
from gan_dist.config.schema import load_config, preset
from gan_dist.distributed.world import World
from gan_dist.training.draws import draw_latents
from gan_dist.training.setup import build_update

EIGHTH = ["model.g_channels=8", "model.d_channels=8", "model.max_channels=64"]
GAMES: dict[str, tuple[str, list[str]]] = {
    "64, thesis": ("paintings64", []),
    "128": ("paintings128", []),
    "128, without the cap": ("paintings128", ["model.max_channels=null"]),
    "128, 64 to 8 channels": ("paintings128", EIGHTH),
    "256": ("paintings256", []),
    "256, 64 channels at its largest maps, without the cap": (
        "paintings256",
        ["model.g_channels=64", "model.d_channels=64", "model.max_channels=null"],
    ),
    "256, 64 to 8 channels": ("paintings256", EIGHTH),
}


def measure(name: str, batch: int, steps: int) -> dict[str, object]:
    """Returns the figures of one game, in this process."""
    torch.set_num_threads(1)
    base, words = GAMES[name]
    config = load_config(preset(base), [f"train.global_batch={batch}", *words])
    update = build_update(config, World(), "fp32")
    networks = (update.g.network, update.d.network)
    side, latent_dim = config.model.resolution, config.model.latent_dim
    real = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    latents = draw_latents(0, 0, batch, latent_dim, 0, batch, torch.device("cpu"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(steps + 1):
        began = time.process_time()
        update.step([real], [latents], draws=update.draw(0, 0))
        seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plain = build_update(load_config(config, ["loss.gradient_penalty.weight=0"]), World(), "fp32")
    return {
        "game": name,
        "million_weights": round(sum(p.numel() for one in networks for p in one.parameters()) / 1e6, 1),
        "gflop_per_image": round(work(plain, [real], [latents])[0] / batch, 2),
        "cpu_seconds": round(statistics.median(seconds[1:]), 2),
        "peak_gib": round(peak / 2**20, 2),
        "before_the_step_gib": round(before / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--game", choices=list(GAMES), help="one, in this process")
    args = parser.parse_args()
    if args.game:
        print(json.dumps(measure(args.game, args.batch, args.steps)))
        return
    for name in GAMES:
        words = ["--batch", str(args.batch), "--steps", str(args.steps), "--game", name]
        subprocess.run([sys.executable, "-m", "tests.bench.compare_sizes", *words], check=True)


if __name__ == "__main__":
    main()

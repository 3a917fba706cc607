"""What each key of a game costs, beside the thesis' step and in turn with it: python -m tests.bench.compare_keys

All play 64x64 at full width, with the random numbers that the game draws. Ratios are medians over the rounds of a
key's step over the thesis' step of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable

import torch

from gan_dist.config.schema import Config, load_config, preset
from gan_dist.distributed.world import World
from gan_dist.runs.run_dir import Start
from gan_dist.sampling.standing import estimate_statistics
from gan_dist.training.draws import draw_flips, draw_latents
from gan_dist.training.setup import build_ema, build_update
from tests.bench.compare_step import timed

PENALTY = ["model.d_norm=none", "loss.gradient_penalty.weight=1"]
KEYS: dict[str, list[str]] = {
    "thesis": [],
    "model.upsample=nearest": ["model.upsample=nearest"],
    "model.d_norm=none": ["model.d_norm=none"],
    "model.d_norm=spectral": ["model.d_norm=spectral"],
    "gradient_penalty, share 0.25": [*PENALTY, "loss.gradient_penalty.share=0.25"],
    "gradient_penalty, share 1": PENALTY,
    "gradient_penalty, on both, share 1": [*PENALTY, "loss.gradient_penalty.on=both"],
    "gradient_penalty, on both, exact": [
        *PENALTY,
        *(f"loss.gradient_penalty.{word}" for word in ("on=both", "method=exact")),
        "train.runner=eager",
    ],
    **{f"loss.name={name}": [f"loss.name={name}"] for name in ("minimax", "hinge", "least_squares", "wasserstein")},
    "loss.name=relativistic": ["loss.name=relativistic"],
    "loss.name=relativistic, model.d_norm=none": ["loss.name=relativistic", "model.d_norm=none"],
    "data.x_flip": ["data.x_flip=true"],
    **{f"data.augment.{kind}": [f"data.augment.{kind}=true"] for kind in ("colour", "translation", "cutout")},
    "data.augment, all, target": [
        *(f"data.augment.{word}" for word in ("colour=true", "translation=true", "cutout=true", "target=0.6"))
    ],
    "model.minibatch_std": ["model.minibatch_std=true"],
    "model.blocks=residual": ["model.blocks=residual"],
    "model.init=he": ["model.init=he"],
    "optim.warmup_images, optim.decay": [
        *(f"optim.{word}" for word in ("warmup_images=1000", "decay=linear", "decay_images=100000"))
    ],
    "optim.beta2_to": ["optim.beta2_to=0.99", "optim.beta2_images=1000"],
    "optim.betas=[0.0,0.99]": ["optim.betas=[0.0,0.99]"],
    "train.ema_half_life_images": ["train.ema_half_life_images=10000"],
}


def step_of(words: list[str], batch: int, precision: str) -> Callable[[], object]:
    """Returns a step of the game that `words` set, drawing included."""
    return a_step(load_config({"data": {"shards": "none"}}, [f"train.global_batch={batch}", *words]), precision)


def a_step(config: Config, precision: str) -> Callable[[], object]:
    """Returns what the loop does for a step of a game without classes: it draws, plays and averages."""
    chosen, batch = "bf16" if precision == "bf16" else "fp32", config.train.global_batch
    update = build_update(config, World(), chosen)  # type: ignore[arg-type]
    ema = build_ema(config, update, Start())
    side, latent_dim = config.model.resolution, config.model.latent_dim
    real = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    part = (0, batch, torch.device("cpu"))

    def step() -> object:
        reals, latents, draws = [], [], []
        for k in range(config.optim.d_steps):
            draw = (0, k * batch, batch)
            flips = draw_flips(*draw, *part)[:, None, None, None] if config.data.x_flip else None
            reals.append(real if flips is None else torch.where(flips, real.flip(-1), real))
            latents.append(draw_latents(*draw, latent_dim, *part))
            draws += update.draw(*draw[:2])
        update.begin(0)
        stats = update.step(reals, latents, draws=draws)
        if ema is not None:
            ema.update(batch)
        return stats

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = {name: step_of(words, args.batch, args.precision) for name, words in KEYS.items()}
    modern = load_config(preset("paintings64-modern").to_dict(), [f"train.global_batch={args.batch}"])
    steps["paintings64-modern, at this batch"] = a_step(modern, args.precision)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(args.rounds + 1):
        for name, step in steps.items():
            found = timed(step, torch.device("cpu"))
            if index:
                seconds[name].append(found)
    ratios = {
        name: statistics.median(one / thesis for one, thesis in zip(found, seconds["thesis"], strict=True))
        for name, found in seconds.items()
    }
    config = load_config({"data": {"shards": "none"}})
    generator = build_update(config, World(), "fp32").g.network
    standing = timed(lambda: estimate_statistics(generator), torch.device("cpu"))  # type: ignore[arg-type]
    result = {
        "batch": args.batch,
        "precision": args.precision,
        "threads": args.threads,
        "torch": torch.__version__,
        "thesis_seconds": statistics.median(seconds["thesis"]),
        "ratio_to_thesis": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "standing_statistics_seconds": round(standing, 2),
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

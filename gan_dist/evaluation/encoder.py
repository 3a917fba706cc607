"""A small network whose features stand in for Inception's where that cannot be had: learned on the dataset itself.

Without labels, by contrast (SimCLR, Chen et al. 2020): two views of one picture shall lie near one another, and far
from those of all others. On its features the Frechet distance, precision and recall are computed as on Inception's. The
figures of two encoders do not compare, so the sha256 of its weights is part of the protocol.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from gan_dist.config.schema import FEWEST_FOR_ENCODER
from gan_dist.data.dataset import Dataset, gather
from gan_dist.data.order import Order
from gan_dist.utils.errors import UserError, first_line
from gan_dist.utils.files import write_atomically
from gan_dist.utils.tensors import state_digest

FILE = "encoder.safetensors"
"""Its place in the folder of the dataset that it was learned on."""
FORMAT = "gan_dist encoder 1"
WIDTHS = (32, 64, 128)
FEATURES = WIDTHS[-1]
FEWEST = FEWEST_FOR_ENCODER
assert FEWEST == 2 * FEATURES
PROJECTED = 64
BATCH, RATE, DECAY = 256, 2e-3, 1e-4
TEMPERATURE = 0.2
SMALLEST_VIEW = 0.3
"""Least share of a picture's area that a view shows."""
JITTER = 0.4
"""Brightness, contrast and saturation of a view are these shares more or less at most."""


class Network(nn.Module):
    """Convolutions of stride 2 down to 4x4, with batch norm, ReLU and one more at 8x8; their mean is the features."""

    def __init__(self, resolution: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        wide, side = 3, resolution
        while side > 4:
            narrow, wide = wide, WIDTHS[min(len(layers) // 3, len(WIDTHS) - 1)]
            side //= 2
            layers += [nn.Conv2d(narrow, wide, 3, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
            if side == 8:
                layers += [nn.Conv2d(wide, wide, 3, 1, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.resolution = resolution

    def forward(self, images: Tensor) -> Tensor:
        """Returns [N, FEATURES] for float images [N, 3, S, S] in [-1, 1]."""
        features: Tensor = self.layers(images).mean((2, 3))
        return features


@dataclass(frozen=True)
class Encoder:
    """A network that has learned; `weights` is the sha256 of its tensors."""

    network: Network
    weights: str

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Returns float32 [N, FEATURES], on the CPU, for uint8 [N, 3, S, S]."""
        device = next(self.network.parameters()).device
        return torch.cat([self.network(_signed(batch.to(device))).cpu() for batch in torch.split(images, BATCH)])


def _signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def views(images: Tensor, source: torch.Generator) -> Tensor:
    """Returns random views of float images [N, 3, S, S] in [-1, 1]: a part of each, perhaps mirrored, in other light.

    The part has SMALLEST_VIEW to all of the area and keeps the sides' ratio.
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=source, device=source.device).to(device)

    scale = uniform(SMALLEST_VIEW, 1).sqrt()
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    where = torch.zeros(count, 2, 3, device=device)
    where[:, 0, 0], where[:, 1, 1] = scale * flip, scale
    where[:, 0, 2], where[:, 1, 2] = uniform(-1, 1) * (1 - scale), uniform(-1, 1) * (1 - scale)
    grid = F.affine_grid(where, list(images.shape), align_corners=False)
    parts = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    brightness, contrast, saturation = (uniform(1 - JITTER, 1 + JITTER).view(-1, 1, 1, 1) for _ in range(3))
    parts = (parts + 1) * brightness - 1
    mean = parts.mean((1, 2, 3), keepdim=True)
    parts = (parts - mean) * contrast + mean
    gray = parts.mean(1, keepdim=True)
    return ((parts - gray) * saturation + gray).clamp(-1, 1)


def contrastive_loss(a: Tensor, b: Tensor) -> Tensor:
    """Returns the NT-Xent loss (Chen et al. 2020, eq. 1) of two views' projections [N, P]: a scalar."""
    rows = F.normalize(torch.cat([a, b]), dim=1)
    likeness = rows @ rows.t() / TEMPERATURE
    likeness.fill_diagonal_(-math.inf)
    other = torch.arange(len(rows), device=rows.device).roll(len(a))
    return F.cross_entropy(likeness, other)


def learn(
    dataset: Dataset,
    images: int,
    seed: int,
    device: torch.device,
    shown: Callable[[str, int, int], None] = lambda verb, done, total: None,
) -> Network:
    """Returns a network that has seen `images` images of the dataset, in the keyed order of its epochs; in eval mode.

    shown: told (verb, done, total) as it goes on. Raises UserError where the dataset has fewer images than a batch.
    """
    if dataset.num_samples < BATCH:
        raise UserError(f"{dataset.root} holds {dataset.num_samples} images; an encoder needs {BATCH} or more")
    steps = max(1, images // BATCH)
    source = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(dataset.resolution)
        head = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, PROJECTED))
    both = nn.ModuleList([network, head]).to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(both.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1)
    order = Order(dataset.shard_sizes, seed)
    for step in range(steps):
        batch = _signed(gather(dataset, order.indices(step * BATCH, (step + 1) * BATCH)).to(device))
        pair = torch.cat([views(batch, source), views(batch, source)]).contiguous(memory_format=torch.channels_last)
        loss = contrastive_loss(*head(network(pair)).chunk(2))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        shown("learned from", (step + 1) * BATCH, steps * BATCH)
    return network.eval()


def make_encoder(
    dataset: Dataset,
    out: Path,
    images: int,
    seed: int,
    device: torch.device,
    shown: Callable[[str, int, int], None] = lambda verb, done, total: None,
) -> bool:
    """Returns whether a new encoder was learned and written to `out`; False where that very one is there already.

    Raises UserError where another one is there: figures that it measured could not be compared with new ones; and
    where it cannot be written, before anything is learned.
    """
    facts = {"dataset": dataset.identity, "images": images, "seed": seed, "resolution": dataset.resolution}
    described = {"format": FORMAT, **{key: str(value) for key, value in facts.items()}}
    if out.suffix != ".safetensors":
        raise UserError(f"--out: expected a file name ending in .safetensors, found {out.name}")
    if out.exists():
        if _described(out) == described:
            return False
        raise UserError(f"{out} is there, and is not this encoder; name another --out, or remove it to learn it anew")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
        network = learn(dataset, images, seed, device, shown).cpu()
        weights = {name: value.contiguous() for name, value in network.state_dict().items()}
        write_atomically(out, save(weights, metadata=described))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; name another --out") from None
    return True


def load_encoder(path: Path, resolution: int, device: torch.device) -> Encoder:
    """Returns the encoder in a file that make_encoder wrote. Raises UserError where it is none for this resolution."""
    described = _described(path)
    if described.get("format") != FORMAT:
        raise UserError(f"{path} holds no encoder; `gan-dist encoder DATASET` learns one")
    if described.get("resolution") != str(resolution):
        raise UserError(
            f"{path} is an encoder of {described.get('resolution')}-pixel images, and these have {resolution}; "
            "`gan-dist encoder DATASET` learns one"
        )
    network = Network(resolution)
    try:
        network.load_state_dict(load(path.read_bytes()))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} holds no encoder: {first_line(error)}") from None
    return Encoder(network.to(device).eval(), state_digest(network.state_dict()))


def _described(path: Path) -> dict[str, str]:
    """Returns what a file says of itself. Raises UserError where it is no safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} holds no encoder: {first_line(error)}") from None

"""How good a generator is, by a fixed protocol that is recorded with every figure; alike on any number of ranks.

uint8 images straight from the generator (no files, no codec) against the first images of a keyed permutation of the
dataset; sliced Wasserstein distance always, Inception's metrics where its weights are at hand, and signs of collapse
and copying.
"""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn

from gan_dist.config.schema import FEWEST_SAMPLES
from gan_dist.data.classes import NO_CLASSES, Classes, Labels
from gan_dist.data.dataset import Dataset, gather
from gan_dist.data.order import Order, rank_slice
from gan_dist.distributed.world import World
from gan_dist.evaluation import inception, swd
from gan_dist.evaluation.agreement import agreement
from gan_dist.evaluation.diversity import pairwise_distance, repeated
from gan_dist.evaluation.encoder import FEWEST as FEWEST_FOR_ENCODER
from gan_dist.evaluation.encoder import Encoder
from gan_dist.model.networks import Generator
from gan_dist.sampling.generate import generate
from gan_dist.sampling.neighbours import copies, nearest
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import write_atomically
from gan_dist.utils.tensors import float32_products

FEWEST = FEWEST_SAMPLES
YOUNG_IMAGES = 200_000
"""Until D has seen so many, samples are alike because little is learned, not because it collapsed: on 20,000 photos, at
a quarter of the width, diversity was 0.32 after 38,000 images and 0.81 after 192,000, growing all the while."""
CHUNK = 256
"""Images a rank makes between two checks for a stop request."""
COPY_SAMPLES = 64
"""Samples whose nearest real image is searched for."""
REPEAT_SAMPLES = 1000
"""Samples among which repeated pictures are searched for."""
ACCURACY_BATCH = 64
"""Real images in a batch of the discriminator."""


@dataclass(frozen=True)
class Protocol:
    """What makes two figures comparable; recorded with each of them."""

    samples: int
    dataset: str
    """The manifest's sha256."""
    averaged: bool
    """Whether the averaged generator drew."""
    seed: int = 0
    """Keys the latents, the choice of real images, and the patches and directions of the distance."""
    metric: str = f"swd-{swd.SIDE}x{swd.SIDE}-{swd.PATCHES}-patches-{swd.DIRECTIONS}-directions-scaled-as-real"
    images: str = "uint8 from the generator, no file format between"
    resizer: str = "torch-fidelity's bilinear (tensorflow 1) to 299, for Inception alone"
    inception: str | None = None
    """The sha256 of Inception's weights, where they were used."""
    encoder: str | None = None
    """The sha256 of the encoder's weights, where one was used."""

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain values, for JSON; as it was before there were encoders where none was used."""
        values = asdict(self)
        return values if self.encoder else {key: value for key, value in values.items() if key != "encoder"}


class Features(typing.Protocol):
    """A network whose features are compared; `weights` names it."""

    @property
    def weights(self) -> str: ...

    def features(self, images: Tensor) -> Tensor:
        """Returns float32 [N, F], on the CPU, for uint8 [N, 3, S, S]."""
        ...


class _Stopped(Exception):
    """Some rank has a stop request."""


class Evaluation:
    """Evaluates generators against one dataset; what depends on the real images alone is computed once.
    Near copies are searched for in `learned_from`, the training set, where that is another one.

    Every rank makes one and calls it alike. Inception's features of the real images are also kept beside the dataset,
    where it can be written (else with a line in the log). The distance's descriptors, 28 KB an image at 64x64, are not:
    those of 10,000 images take 4 s of a core to make, in an evaluation of 90. `published` adds the distance in the form
    of the ProGAN paper's program, which takes several times as long; `floor` adds the distance between the real images
    and as many others, which no generator need beat; `label`, a class of the generator's, compares images of that alone
    with `members`, the real ones of it. Raises UserError when the dataset, or `samples`, is too small.
    """

    def __init__(
        self,
        world: World,
        dataset: Dataset,
        samples: int,
        *,
        seed: int = 0,
        learned_from: Dataset | None = None,
        features: inception.Inception | None = None,
        encoder: Encoder | None = None,
        published: bool = False,
        floor: bool = False,
        label: int | None = None,
        members: NDArray[np.int64] | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        fewest = max(FEWEST, world.size, inception.FEWEST if features else 0, FEWEST_FOR_ENCODER if encoder else 0)
        check_samples(samples, dataset, fewest, floor=floor)
        self._world, self._dataset, self._samples, self._seed = world, dataset, samples, seed
        self._features, self._encoder, self._published, self._log = features, encoder, published, log
        self._wants_floor = floor
        self._floor: float | None = None
        self._feature_floor: float | None = None
        self._lo, self._hi = rank_slice(samples, world.rank, world.size)
        self._where = swd.positions(samples, dataset.resolution, seed)
        self._real: list[Tensor] | None = None
        self._learned_from = learned_from or dataset
        self._label, self._members = label, members
        self.agreements: dict[int, tuple[int, float]] = {}
        """Of the newest figures, by class: as agreement() returns them."""

    def __call__(
        self,
        generator: nn.Module,
        latent_dim: int,
        *,
        averaged: bool,
        stopped: Callable[[], bool] = lambda: False,
        near_copies: bool = True,
    ) -> dict[str, Any] | None:
        """Returns the figures, alike on every rank, or None when `stopped` returned True on some rank meanwhile.

        Keys: swd (lower is better), swd_<side> a level, diversity (pairwise distance of samples over that of reals),
        repeated (share of samples nearly the same as another one), near_copies (share of samples), protocol; with
        `published` also swd_progan and its levels, with `floor` swd_floor; with Inception fid, kid, kid_std, precision,
        recall; with an encoder feature_distance, feature_precision and feature_recall, with `floor` its floor, too, and
        for a generator with classes class_agreement, .._chance and .._real, see agreement.py. Of such a one as many
        images of each class are drawn as the dataset has. Changes neither the generator nor any shared random state.
        """
        try:
            with float32_products("ieee"):
                check = partial(self._raise_if_stopped, stopped)
                return self._figures(generator, latent_dim, averaged, near_copies, check)
        except _Stopped:
            return None

    def _raise_if_stopped(self, stopped: Callable[[], bool]) -> None:
        if self._world.any(stopped()):
            raise _Stopped

    def _figures(
        self, generator: nn.Module, latent_dim: int, averaged: bool, near_copies: bool, check: Callable[[], None]
    ) -> dict[str, Any]:
        source = torch.Generator().manual_seed(self._seed)
        latents = torch.randn(self._samples, latent_dim, generator=source)
        asked, classes = None, getattr(generator, "classes", NO_CLASSES)
        if isinstance(generator, Generator) and classes.names:
            asked = classes.draw(self._samples, self._seed)
            asked = asked if self._label is None else torch.full_like(asked, self._label)
            latents = generator.with_classes(latents, asked)
        images, described = self._share(lambda lo, hi: generate(generator, latents[lo:hi]), check)
        if self._real is None:
            self._real_images, self._real = self._share(self._reals, check)
        if self._wants_floor and self._floor is None:
            self._other_images, others = self._share(
                lambda lo, hi: self._reals(self._samples + lo, self._samples + hi), check
            )
            self._floor = fmean(swd.sliced_wasserstein(self._world, self._real, others, self._seed, check))
        distances = swd.sliced_wasserstein(self._world, self._real, described, self._seed, check)
        figures: dict[str, Any] = {"swd": fmean(distances)}
        sides = swd.levels(self._dataset.resolution)
        figures |= {f"swd_{side}": distance for side, distance in zip(sides, distances, strict=True)}
        if self._wants_floor:
            figures["swd_floor"] = self._floor
        drawn, usual = (pairwise_distance(self._world, one) for one in (images, self._real_images))
        figures["diversity"] = drawn / max(usual, 1e-6)
        few = min(REPEAT_SAMPLES, self._samples)
        figures["repeated"] = self._world.from_first(
            lambda: repeated(self._first(few, images, generator, latents), self._reals(0, few))
        )
        if near_copies:
            first = self._world.from_first(lambda: self._first(COPY_SAMPLES, images, generator, latents))
            figures["near_copies"] = self._near_copies(first, check)
        if self._published:
            figures |= self._as_published(images, check)
        if self._features is not None:
            real, fake = (
                self._real_features("inception", self._features),
                self._gathered(self._features.features(images)),
            )
            figures |= self._world.from_first(partial(inception.distances, real, fake))
        if self._encoder is not None:
            figures |= self._by_encoder(self._encoder, images, asked, classes)
        weights = [network.weights if network else None for network in (self._features, self._encoder)]
        protocol = Protocol(
            self._samples, self._dataset.identity, averaged, self._seed, inception=weights[0], encoder=weights[1]
        )
        return {**figures, "protocol": protocol.to_dict()}

    def _by_encoder(self, encoder: Encoder, images: Tensor, asked: Tensor | None, classes: Classes) -> dict[str, float]:
        """Returns the figures on the encoder's features for this rank's `images`, which were asked to be of `asked`."""
        real, fake = self._real_features("encoder", encoder), self._gathered(encoder.features(images))

        def figures() -> dict[str, float]:
            precision, recall = inception.precision_recall(real, fake)
            distance = inception.frechet(real, fake)
            return {"feature_distance": distance, "feature_precision": precision, "feature_recall": recall}

        found: dict[str, float] = self._world.from_first(figures)
        if self._wants_floor:
            if self._feature_floor is None:
                others = self._gathered(encoder.features(self._other_images))
                self._feature_floor = self._world.from_first(lambda: inception.frechet(real, others))
            found["feature_distance_floor"] = self._feature_floor
        if asked is not None:

            def agreements() -> tuple[dict[str, float], dict[int, tuple[int, float]]]:
                order = Order(self._dataset.shard_sizes, self._seed)
                labels = Labels(self._dataset, classes).of(order.indices(0, self._samples))
                return agreement(real, torch.from_numpy(labels), fake, asked)

            more, self.agreements = self._world.from_first(agreements)
            found |= more
        return found

    def _first(self, count: int, images: Tensor, generator: nn.Module, latents: Tensor) -> Tensor:
        """Returns the first `count` samples, for rank 0, whose share is `images`; made again where that is shorter."""
        return images[:count] if len(images) >= count else generate(generator, latents[:count]).cpu()

    def _as_published(self, images: Tensor, check: Callable[[], None]) -> dict[str, float]:
        """Returns the distance in the paper's own form: more patches, each set normalised by itself.

        Level by level, because the descriptors of 10,000 images take 750 MB a level.
        """
        where = swd.positions(self._samples, self._dataset.resolution, self._seed, swd.PUBLISHED_PATCHES)
        figures = {}
        for level, side in enumerate(swd.levels(self._dataset.resolution)):
            check()
            mine = [corners[self._lo : self._hi] if number == level else None for number, corners in enumerate(where)]
            real, fake = (
                self._gathered(swd.descriptors(one, mine, self._world.device)[0], swd.PUBLISHED_PATCHES)
                for one in (self._real_images, images)
            )
            (figures[f"swd_progan_{side}"],) = swd.sliced_wasserstein(
                self._world, [real], [fake], self._seed, check, published=True
            )
        return {"swd_progan": fmean(figures.values()), **figures}

    def _reals(self, lo: int, hi: int) -> Tensor:
        if self._members is not None:
            chosen = Order((len(self._members),), self._seed).indices(lo, hi)
            return gather(self._dataset, self._members[chosen])
        order = Order(self._dataset.shard_sizes, self._seed)
        return gather(self._dataset, order.indices(lo, hi))

    def _share(self, make: Callable[[int, int], Tensor], check: Callable[[], None]) -> tuple[Tensor, list[Tensor]]:
        """Returns this rank's images and the descriptors of all ranks'."""
        images: list[Tensor] = []
        parts: list[list[Tensor]] = []
        widest = -(-self._samples // self._world.size)
        for start in range(0, widest, CHUNK):  # as many turns on every rank
            check()
            lo, hi = min(self._hi, self._lo + start), min(self._hi, self._lo + start + CHUNK)
            made = self._world.together(partial(make, lo, hi) if lo < hi else _nothing)
            if made is not None:
                parts.append(swd.descriptors(made.to(self._world.device), [where[lo:hi] for where in self._where]))
                images.append(made.cpu())
        own = [torch.cat(level) for level in zip(*parts, strict=True)]
        return torch.cat(images), [self._gathered(level, swd.PATCHES) for level in own]

    def _gathered(self, rows: Tensor, rows_an_image: int = 1) -> Tensor:
        """Returns all ranks' rows [n, k] in the order of the images, on this rank's device."""
        world = self._world
        if world.size == 1:
            return rows
        slices = [rank_slice(self._samples, rank, world.size) for rank in range(world.size)]
        counts = [(hi - lo) * rows_an_image for lo, hi in slices]
        padded = torch.zeros(max(counts), rows.shape[1], dtype=rows.dtype, device=world.device)
        padded[: len(rows)] = rows
        out = torch.empty(world.size, *padded.shape, dtype=rows.dtype, device=world.device)
        world.all_gather_into(out, padded)
        return torch.cat([part[:count] for part, count in zip(out, counts, strict=True)]).to(rows.device)

    def _near_copies(self, images: Tensor, check: Callable[[], None]) -> float:
        """Returns the share of `images`, uint8 [n, 3, S, S] and alike on every rank, that nearly equal a real one."""
        _, distances, usual = nearest(images, self._learned_from, self._world, check)
        return copies(images, distances, usual) / len(images)

    def _real_features(self, name: str, network: Features) -> Tensor:
        """Returns the real images' features, from beside the dataset where they have been computed before."""
        key = json.dumps([self._samples, self._seed, self._dataset.identity, network.weights])
        path = self._dataset.root / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        features = self._world.from_first(lambda: _read_features(path))
        if features is None:
            features = self._gathered(network.features(self._real_images))
            if self._world.rank == 0:
                self._keep_features(path, features)
        return features

    def _keep_features(self, path: Path, features: Tensor) -> None:
        """Writes the features whole or not at all."""
        try:
            write_atomically(path, save({"features": features.contiguous()}), make_folder=True)
        except OSError as error:
            self._log(f"note: real images' features cannot be kept in {path.parent} ({error.strerror}): made each time")


def check_samples(
    samples: int, dataset: Dataset, fewest: int, name: str = "evaluate.samples", *, floor: bool = False
) -> None:
    """Raises UserError unless `samples`, called `name` in messages, and the dataset are large enough for the metrics.

    A `floor` needs twice as many real images.
    """
    if dataset.num_samples < fewest:
        raise UserError(
            f"{dataset.root} holds {dataset.num_samples} images; these metrics need {fewest} or more real ones"
        )
    if floor and dataset.num_samples < 2 * fewest:
        raise UserError(f"--floor needs {2 * fewest} real images or more; {dataset.root} holds {dataset.num_samples}")
    if samples < fewest:
        raise UserError(f"{name}: expected {fewest} or more for these metrics, found {samples}")
    if samples > dataset.num_samples:
        raise UserError(
            f"{name}: expected {dataset.num_samples} or fewer, as many as {dataset.root} holds, found {samples}"
        )
    if floor and 2 * samples > dataset.num_samples:
        raise UserError(
            f"--floor compares {samples} real images with {samples} others, but {dataset.root} holds "
            f"{dataset.num_samples}; give a smaller --samples, or leave it out"
        )


def _nothing() -> None:
    """What a rank makes whose share is complete."""


def _read_features(path: Path) -> Tensor | None:
    try:
        return load_file(path)["features"]
    except (OSError, KeyError, ValueError):
        return None
    except Exception:  # safetensors' own error for a torn file, which has no public name
        return None


def warnings(figures: dict[str, Any], most_diverse: float = 0.0) -> list[str]:
    """Returns a line for each sign of trouble in the figures, with what to try.

    `images_seen` among them marks a young generator; `most_diverse` is the highest diversity that the run has had.
    """
    lines = []
    grown = figures.get("images_seen", YOUNG_IMAGES) >= YOUNG_IMAGES
    advice = "try a lower optim.g_lr, loss.real_target=0.9, or go back to an earlier checkpoint with --from"
    if figures["diversity"] < 0.5 and (grown or figures["diversity"] < most_diverse * 2 / 3):
        before = f", after {most_diverse:.0%}" if most_diverse > figures["diversity"] else ""
        lines.append(
            f"samples differ {figures['diversity']:.0%} as much as real images do{before}: the generator collapses to "
            f"few pictures; {advice}"
        )
    elif figures.get("repeated", 0) > 0.1 and grown:
        lines.append(
            f"{figures['repeated']:.0%} of the samples looked at are nearly the same as another one: the generator "
            f"collapses to few pictures; {advice}"
        )
    if figures.get("near_copies", 0) > 0.1:
        lines.append(
            f"{figures['near_copies']:.0%} of the samples looked at are nearly copies of real images: the networks are "
            "large for this dataset; try data.x_flip=true, fewer epochs, or smaller model.g_channels and d_channels"
        )
    if (training := figures.get("accuracy_training")) is not None and training - figures["accuracy_held_out"] > 0.2:
        lines.append(
            f"the discriminator knows {training:.0%} of the training images but {figures['accuracy_held_out']:.0%} of "
            "the others: it learns them by heart; try more images, data.x_flip=true, or smaller model.d_channels"
        )
    return lines


@torch.no_grad()
def accuracy(discriminator: nn.Module, dataset: Dataset, count: int, seed: int = 0) -> float:
    """Returns the share of `count` real images that the discriminator takes for real.

    Batches hold real images alone and are normalised by their own statistics, as in training. The running statistics
    mix real and fake images, and D has never been trained with them: one D recognised 14% of its training images with
    them, and 99% as in training. They change here, so pass a copy.
    """
    discriminator.train()
    chosen = Order(dataset.shard_sizes, seed).indices(0, min(count, dataset.num_samples))
    size = min(ACCURACY_BATCH, len(chosen))
    parameter = next(discriminator.parameters())
    right = total = 0
    for start in range(0, len(chosen) - size + 1, size):  # whole batches: a small one has other statistics
        images = gather(dataset, chosen[start : start + size]).to(parameter.device)
        with float32_products("ieee"):
            right += int((discriminator(images.to(parameter.dtype) / 127.5 - 1) > 0).sum())
        total += size
    return right / total

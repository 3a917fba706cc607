"""Inception's metrics against closed forms and constructed sets; the network itself with weights drawn at random."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from torch_fidelity import feature_extractor_inceptionv3, metric_fid
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from gan_dist.distributed.world import World
from gan_dist.evaluation import inception
from gan_dist.evaluation.diversity import pairwise_distance
from gan_dist.evaluation.inception import distances, frechet, kernel, load_inception, precision_recall
from gan_dist.utils.errors import UserError


def normal(count: int, features: int, mean: float, scale: float, seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, generator=source, dtype=torch.float64) * scale + mean


def test_frechet_distance_is_the_closed_form() -> None:
    """Of the samples' own Gaussians: |m - n|^2 + tr(C + D - 2 (CD)^(1/2)) (Dowson and Landau 1982)."""
    real, fake = normal(3000, 16, 0.0, 1.0, 0), normal(3000, 16, 0.5, 2.0, 1)
    m, n = real.mean(0).numpy(), fake.mean(0).numpy()
    c, d = np.cov(real.numpy(), rowvar=False), np.cov(fake.numpy(), rowvar=False)
    root = np.sqrt(np.linalg.eigvals(c @ d).real).sum()  # the trace of (CD)^(1/2)
    expected = ((m - n) ** 2).sum() + np.trace(c + d) - 2 * root
    assert frechet(real, fake) == pytest.approx(expected, rel=1e-6)
    # And of the distributions themselves: 16 (0.25 + 1).
    assert frechet(real, fake) == pytest.approx(20, rel=0.05)


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    """One subset of all samples: the mean of (x.y / f + 1)^3 over pairs (Binkowski et al. 2018, eq. 4)."""
    real, fake = normal(200, 8, 0.0, 1.0, 0), normal(200, 8, 0.7, 1.0, 1)

    def polynomial(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.t() / 8 + 1) ** 3

    k, q = polynomial(real, real), polynomial(fake, fake)
    within = (k.sum() - k.trace() + q.sum() - q.trace()) / (200 * 199)
    expected = float(within - 2 * polynomial(real, fake).mean())
    found, deviation = kernel(real, fake)
    assert found == pytest.approx(expected, rel=1e-5) and deviation < 1e-6


def test_precision_and_recall_of_constructed_sets() -> None:
    left, right = normal(500, 4, 0.0, 1.0, 0), normal(500, 4, 100.0, 1.0, 1)
    both = torch.cat([left, right])
    precision, recall = precision_recall(both, left)  # the generator draws half of what there is, and that well
    assert precision > 0.95 and recall == pytest.approx(0.5, abs=0.05)
    precision, recall = precision_recall(left, both)  # it draws all there is, and as much again that there is not
    assert recall > 0.95 and precision == pytest.approx(0.5, abs=0.05)


def test_precision_and_recall_match_a_plain_reference() -> None:
    """A point is covered when it lies no further from some point of the other set than that one's third neighbour."""
    real, fake = normal(80, 3, 0.0, 1.0, 0), normal(70, 3, 0.6, 1.3, 1)

    def covered(points: torch.Tensor, others: torch.Tensor) -> float:
        radii = [sorted(float((one - other).norm()) for other in others)[3] for one in others]
        near = [any(float((one - other).norm()) <= r for other, r in zip(others, radii, strict=True)) for one in points]
        return sum(near) / len(near)

    precision, recall = precision_recall(real, fake)
    assert precision == pytest.approx(covered(fake, real)) and 0.2 < precision < 0.95
    assert recall == pytest.approx(covered(real, fake)) and 0.2 < recall < 0.99


def test_pairwise_distance_is_that_of_all_pairs() -> None:
    images = torch.randint(0, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    values = images.double().flatten(1)
    squares = torch.cdist(values, values).square() / values.shape[1]
    assert pairwise_distance(World(), images) == pytest.approx(float(squares.mean().sqrt()), rel=1e-9)
    assert pairwise_distance(World(), images[:1].expand(5, -1, -1, -1)) == 0


def test_weights_that_are_none_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no Inception weights at .*nothing; expected torch-fidelity's"):
        load_inception(tmp_path / "nothing", torch.device("cpu"))
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(UserError, match="does not hold Inception's weights"):
        load_inception(tmp_path / "junk", torch.device("cpu"))


def test_a_file_of_weights_runs_no_code(tmp_path: Path) -> None:
    torch.save({"fc.weight": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match="holds more than tensors, which is never run") as caught:
        load_inception(tmp_path / "trap.pth", torch.device("cpu"))
    assert "\n" not in str(caught.value) and not (tmp_path / "sprung").exists()


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def random_weights(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes weights of torch-fidelity's Inception that nobody trained: no download, the same network and format."""
    with monkeypatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception", ["2048"])
    source = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, generator=source)
    torch.save(network.state_dict(), file)


def test_all_figures_are_those_that_torch_fidelity_tells_of_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_weights(file := tmp_path / "random.pth", monkeypatch)
    network = load_inception(file, torch.device("cpu"))
    assert network.weights == hashlib.sha256(file.read_bytes()).hexdigest()
    source = torch.Generator().manual_seed(1)
    real = torch.randint(0, 256, (12, 3, 32, 32), generator=source, dtype=torch.uint8)
    paler = torch.randint(90, 200, (8, 3, 32, 32), generator=source, dtype=torch.uint8)
    fake = torch.cat([real[:4] // 2 * 2, paler])
    monkeypatch.setattr(inception, "KID_SUBSET_SIZE", 6)  # so that it matters which are drawn
    # The root of a matrix of 2048 x 2048 takes half a minute, ours and theirs: some of the features do.
    statistics = metric_fid.fid_features_to_statistics
    monkeypatch.setattr(metric_fid, "fid_features_to_statistics", lambda features: statistics(features[:, ::16]))
    found = distances(network.features(real), network.features(fake))
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(fake),
        input2=Images(real),
        fid=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(file),
        feature_layer_prc="2048",
        kid_subset_size=6,
        rng_seed=0,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,  # and no worker processes
    )
    names = {"fid": "frechet_inception_distance", "precision": "precision", "recall": "recall"}
    names |= {"kid": "kernel_inception_distance_mean", "kid_std": "kernel_inception_distance_std"}
    assert found == pytest.approx({ours: theirs[name] for ours, name in names.items()}, rel=1e-4, abs=1e-6)
    assert found["fid"] > 1 and 0 < found["precision"] < 0.5 < found["recall"]


class Images(torch.utils.data.Dataset[torch.Tensor]):
    """What torch-fidelity takes for a set of images."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def test_metrics_have_their_usual_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "KID_SUBSET_SIZE", 50)
    left, right = normal(500, 4, 0.0, 1.0, 0), normal(500, 4, 100.0, 1.0, 1)
    found = distances(torch.cat([left, right]), left)  # half of what there is, and that well
    assert set(found) == {"fid", "kid", "kid_std", "precision", "recall"}
    assert found["precision"] > 0.95 and found["recall"] == pytest.approx(0.5, abs=0.05)
    assert found["fid"] == pytest.approx(frechet(torch.cat([left, right]), left))
    assert (found["kid"], found["kid_std"]) == kernel(torch.cat([left, right]), left)

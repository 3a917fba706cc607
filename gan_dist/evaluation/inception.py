"""FID, KID, precision and recall, on Inception's features: all through torch-fidelity, network and formulas.

Precision and recall are computed on Inception's features too, so that one network serves all. The paper that
introduced them, and torch-fidelity by default, use VGG16's: those figures are not comparable.
"""

from __future__ import annotations

import hashlib
import pickle
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gan_dist.utils.errors import UserError, first_line
from gan_dist.utils.files import expand

FEWEST = 2049
"""Images from which the covariance of 2,048 features can have full rank."""
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURHOOD = 3
DOWNLOAD_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Inception:
    """The network of Szegedy et al. 2015 as FID uses it; `weights` is its file's sha256."""

    network: Any
    weights: str

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Returns float32 [N, 2048], on the CPU, for uint8 [N, 3, S, S]; resizing to 299 is the network's own."""
        device = next(self.network.parameters()).device
        features = [self.network(batch.to(device))[0].float().cpu() for batch in torch.split(images, 64)]
        return torch.cat(features)


def load_inception(weights: str | Path | None, device: torch.device) -> Inception:
    """Returns Inception with the weights in file `weights`, or with torch-fidelity's own, downloaded once.

    Raises UserError where they cannot be had, or where the file holds more than tensors.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    name = URL_INCEPTION_V3.rpartition("/")[2]
    path = expand(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / name
    if weights and not path.is_file():
        raise UserError(f"no Inception weights at {path}; expected torch-fidelity's {name}")
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), progress=False)
        # torch-fidelity's own reading runs whatever code the file holds.
        torch.load(path, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except OSError as error:
        raise UserError(
            f"Inception's weights cannot be downloaded ({error}); download {URL_INCEPTION_V3} elsewhere and pass the "
            "file as --inception FILE"
        ) from None
    except pickle.UnpicklingError:  # its message explains how to run the file's code nevertheless
        raise UserError(
            f"{path} does not hold Inception's weights: it is damaged, or holds more than tensors, which is never run; "
            f"expected torch-fidelity's {name}"
        ) from None
    except Exception as error:  # torch.load has many errors for a file that is none
        raise UserError(f"{path} does not hold Inception's weights: {first_line(error)}") from None
    finally:
        socket.setdefaulttimeout(before)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Inception(network.to(device).eval(), digest)


def frechet(real: Tensor, fake: Tensor) -> float:
    """Returns the Frechet distance of the Gaussians fitted to features [N, F] and [M, F] (Heusel et al. 2017)."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(features) for features in (fake, real)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])


def kernel(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Returns KID and its deviation over subsets of features [N, F] and [M, F] (Binkowski et al. 2018)."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(KID_SUBSET_SIZE, len(real), len(fake))
    options = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size, "rng_seed": 0, "kid_kernel": "poly"}
    metrics = kid_features_to_metric(fake, real, verbose=False, **options)
    return float(metrics["kernel_inception_distance_mean"]), float(metrics["kernel_inception_distance_std"])


def precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Returns the share of fakes among the reals, and of reals among the fakes (Kynkaanniemi et al. 2019)."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    options = {"prc_neighborhood": NEIGHBOURHOOD, "prc_batch_size": 10000, "save_cpu_ram": True}
    metrics = prc_features_to_metric(fake, real, verbose=False, **options)
    return float(metrics["precision"]), float(metrics["recall"])


def distances(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Returns fid, kid, kid_std, precision and recall of features [N, F] and [M, F]."""
    kid, deviation = kernel(real, fake)
    precision, recall = precision_recall(real, fake)
    fid = frechet(real, fake)
    return {"fid": fid, "kid": kid, "kid_std": deviation, "precision": precision, "recall": recall}

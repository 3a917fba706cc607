"""Whether a generator paints what it is asked for, as a classifier sees it that has learned from real images alone.

The classifier is multinomial logistic regression on the features of an encoder. That one was learned without labels, so
what its features tell of a class they tell of real and generated images alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

EVERY = 5
"""Of so many labelled real images one is kept from the classifier, to try it on."""
FEWEST = 10
"""Real images that a class must have for the classifier to learn it."""
DECAY, STEPS = 1e-3, 200


def agreement(
    real: Tensor, labels: Tensor, fake: Tensor, asked: Tensor
) -> tuple[dict[str, float], dict[int, tuple[int, float]]]:
    """Returns figures of all classes, and by class how many images were asked of it, and in what share it was seen.

    real, fake: features, float32 [N, F] and [M, F]; labels, asked: their classes, int64 [N] and [M], 0 without one.
    Figures: class_agreement, the share of fakes in which the classifier sees the class that was asked; .._chance, what
    that share would be if fakes had nothing to do with what was asked; .._real, the share of other real images of which
    it is right, which a perfect generator would reach. None where fewer than two classes are large enough.
    """
    kept = [label for label, count in enumerate(torch.bincount(labels).tolist()) if label and count >= FEWEST]
    if len(kept) < 2:
        return {}, {}
    number = torch.full((int(max(labels.max(), asked.max())) + 1,), -1)
    number[kept] = torch.arange(len(kept))
    labels, asked = number[labels], number[asked]
    real, labels = real[labels >= 0], labels[labels >= 0]
    fake, asked = fake[asked >= 0], asked[asked >= 0]
    if not len(fake):
        return {}, {}
    tried = torch.arange(len(real)) % EVERY == 0
    seen_in = _classifier(real[~tried], labels[~tried], len(kept))
    seen, right = seen_in(fake), seen_in(real[tried]) == labels[tried]
    shares = [torch.bincount(each, minlength=len(kept)).double() / len(each) for each in (asked, seen)]
    figures = {
        "class_agreement": float((seen == asked).double().mean()),
        "class_agreement_chance": float(shares[0] @ shares[1]),
        "class_agreement_real": float(right.double().mean()),
    }
    of_class = {label: seen[asked == i] == i for i, label in enumerate(kept)}
    return figures, {
        label: (len(agreed), float(agreed.double().mean())) for label, agreed in of_class.items() if len(agreed)
    }


def _classifier(features: Tensor, labels: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    """Returns a function from features [N, F] to the classes int64 [N], 0 to `count` - 1, that it sees in them."""
    features = features.double()
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    weight = torch.zeros(features.shape[1] + 1, count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=STEPS, line_search_fn="strong_wolfe")

    def logits(rows: Tensor) -> Tensor:
        scaled = (rows.double() - mean) / deviation
        return scaled @ weight[:-1] + weight[-1]

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits(features), labels) + DECAY * weight[:-1].square().sum()
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return lambda rows: logits(rows).detach().argmax(1)

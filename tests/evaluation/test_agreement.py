"""Whether a generator paints what it is asked for: the classifier, and the figures of a run with classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gan_dist.data.dataset import open_dataset
from gan_dist.distributed.world import World
from gan_dist.evaluation import encoder, evaluate
from gan_dist.evaluation.agreement import agreement
from gan_dist.evaluation.evaluate import EvaluationOptions, evaluate_run
from gan_dist.report.report import make_report
from gan_dist.training.trainer import train
from gan_dist.utils.errors import UserError
from tests.helpers.datasets import write_dataset
from tests.helpers.training import small

CENTRES = 3 * torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


def features(labels: Tensor, seed: int) -> Tensor:
    """Returns a cloud of points for each class, [N, 16]."""
    return CENTRES[labels] + torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(seed))


def drawn(count: int, seed: int, classes: int = 4) -> Tensor:
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed))


def test_who_paints_what_is_asked_agrees_and_who_does_not_is_at_chance() -> None:
    labels, asked = drawn(1000, 1), drawn(600, 2)
    real = features(labels, 3)
    good, by_class = agreement(real, labels, features(asked, 4), asked)
    assert good["class_agreement"] > 0.95 and good["class_agreement_real"] > 0.95
    assert good["class_agreement_chance"] == pytest.approx(1 / 3, abs=0.05)  # class 0 is none
    assert sorted(by_class) == [1, 2, 3]
    assert by_class[2][0] == int((asked == 2).sum()) and min(share for _, share in by_class.values()) > 0.9
    deaf, _ = agreement(real, labels, features(drawn(600, 5), 4), asked)
    assert deaf["class_agreement"] == pytest.approx(deaf["class_agreement_chance"], abs=0.08)
    half = torch.where(torch.arange(600) % 2 == 0, asked, drawn(600, 5))
    some, _ = agreement(real, labels, features(half, 4), asked)
    assert deaf["class_agreement"] + 0.2 < some["class_agreement"] < good["class_agreement"] - 0.2


def test_chance_knows_that_some_classes_are_frequent() -> None:
    """A generator of nothing but the most frequent class is right as often as that is asked for, and no more."""
    labels = torch.where(drawn(1000, 1, 10) < 9, 1, 2)
    asked = torch.where(drawn(600, 2, 10) < 9, 1, 2)
    found, by_class = agreement(features(labels, 3), labels, features(torch.ones_like(asked), 4), asked)
    assert found["class_agreement"] == pytest.approx(found["class_agreement_chance"], abs=0.03) and by_class[2][1] < 0.1


def test_classes_too_small_to_learn_are_left_out() -> None:
    labels = torch.tensor([1] * 40 + [2] * 9 + [0] * 50)
    assert agreement(features(labels, 1), labels, features(labels, 2), labels) == ({}, {})


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled") / "shards"
    write_dataset(folder, (150, 150), labels=[(0, 1, 1, None)[i % 4] for i in range(300)], classes=("few", "many"))
    with open_dataset(folder) as real:
        encoder.make_encoder(real, folder / encoder.FILE, encoder.BATCH, 0, torch.device("cpu"))
    return folder


def test_a_run_with_classes_has_figures_of_all_and_of_each(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "PER_CLASS", 100)
    words = ["model.classes=dataset", "model.classes_min_images=1"]
    train(small(labelled), words, run_dir=tmp_path / "run", max_steps=1, console=False)
    options = EvaluationOptions(samples=256, inception="none", classes=True)
    (row,) = evaluate_run(World(), tmp_path / "run", options)
    assert 0 <= row["class_agreement"] <= 1 and 0 < row["class_agreement_chance"] < 1
    assert list(row["classes"]) == ["many"]  # of `few` there are but 75 real images
    many = row["classes"]["many"]
    assert many["images"] == 150 and many["swd"] > 0 and 0 <= many["agreement"] <= 1
    make_report(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "By class, at step 1" in page and "class agreement chance" in page

    train(small(labelled), run_dir=tmp_path / "plain", max_steps=1, console=False)
    with pytest.raises(
        UserError, match=r"--classes: .* knows no classes; a run with model.classes=dataset learns them"
    ):
        evaluate_run(World(), tmp_path / "plain", options)

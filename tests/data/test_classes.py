"""Classes: which labels of a dataset become one, how they are asked for, and the class beside each image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gan_dist.data.classes import Classes, Labels, choose_classes, one_hot
from gan_dist.data.dataset import open_dataset
from gan_dist.data.order import Order
from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.prepare.synthetic import paint_folder
from gan_dist.data.stream import Stream
from gan_dist.utils.errors import UserError
from tests.helpers.datasets import write_dataset

LABELS = [None, 0, 0, 0, 2, 2, None, 2, 2, 1]
NAMES = ("Baroque", "Cubism, late", "Rococo")
STYLES = Classes(("Baroque", "Cubism, late", "Rococo", "rococo"), (5, 3, 1, 4, 1))


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "set", (4, 6), labels=LABELS, classes=NAMES)
    return tmp_path / "set"


def test_rare_classes_count_as_unlabelled(labelled: Path) -> None:
    with open_dataset(labelled) as real:
        assert choose_classes(real, 0) == Classes(NAMES, (2, 3, 1, 4))
        assert choose_classes(real, 3) == Classes(("Baroque", "Rococo"), (3, 3, 4))
        with pytest.raises(UserError, match=r"is 100, but the largest class of .*, 'Rococo', has 4 images; lower it"):
            choose_classes(real, 100)


def test_what_prepare_counts_is_what_the_sidecars_say(tmp_path: Path) -> None:
    for name, count in (("one", 5), ("two", 9)):
        paint_folder(tmp_path / "paintings" / name, count)
    prepare([tmp_path / "paintings"], tmp_path / "set", resolution=32, shard_samples=4, labels="folders")
    with open_dataset(tmp_path / "set") as real:
        assert choose_classes(real, 1) == Classes(("one", "two"), (0, 5, 9))
        real.manifest.totals.pop("classes")
        assert choose_classes(real, 1) == Classes(("one", "two"), (0, 5, 9))


def test_a_set_without_labels_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set")
    with open_dataset(tmp_path / "set") as real, pytest.raises(UserError, match="has no labels: prepare it with --lab"):
        choose_classes(real, 0)


def test_the_stream_delivers_them_beside_the_images_where_they_are_asked_for(labelled: Path) -> None:
    with open_dataset(labelled) as real:
        order, classes = Order(real.shard_sizes, 3), choose_classes(real, 3)
        expected = torch.tensor([{None: 0, 0: 1, 1: 0, 2: 2}[label] for label in LABELS])
        for labels in (Labels(real, classes), None):
            with Stream(real, order, position=7, global_batch=3, rank=1, size=2, device=torch.device("cpu"),
                        labels=labels) as stream:  # fmt: skip
                for begin in range(7, 60, 3):
                    stream.next()
                    if labels is None:
                        assert stream.classes is None
                    else:
                        assert stream.classes is not None
                        assert torch.equal(stream.classes, expected[order.indices(begin + 1, begin + 3)])


@pytest.mark.parametrize("harm", ["altered", "cut", "missing", "not JSON", "another label"])
def test_damaged_labels_are_named(labelled: Path, harm: str) -> None:
    path = labelled / "shard-00001.jsonl"
    text = path.read_text()
    match harm:
        case "altered":
            path.write_text(text.replace('"label": 2', '"label": 1'))
        case "cut":
            path.write_text("".join(text.splitlines(keepends=True)[:-1]))
        case "not JSON":
            path.write_text(text.replace("{", "["))
        case "another label":
            path.write_text(text.replace('"label": 2', '"label": 3'))
        case "missing":
            path.unlink()
    with open_dataset(labelled) as real:
        if harm in ("cut", "not JSON", "another label"):  # found even where no hash is known
            object.__setattr__(real.manifest.shards[1], "sidecar_sha256", "")
        with pytest.raises(
            UserError, match=r"shard-00001.jsonl .*it has the labels of its shard; run the `gan-dist pre"
        ):
            Labels(real, Classes(NAMES)).load(1)


@pytest.mark.parametrize(
    ("asked", "found"),
    [("Baroque", 1), ("baroque", 1), ("cubism, LATE", 2), ("Rococo", 3), ("rococo", 4), ("unlabelled", 0)],
)
def test_a_class_is_asked_for_by_name(asked: str, found: int) -> None:
    assert STYLES.find(asked) == found


def test_an_accent_is_the_same_however_it_is_composed() -> None:
    styles = Classes(("Gr\u00fcn", "E\u0301cole"))
    assert styles.find("gru\u0308n") == 1 and styles.find("\u00e9cole") == 2
    assert styles.parse("\u00c9COLE,Gru\u0308n") == [2, 1]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("barock", r"^--class: no class 'barock'; did you mean 'Baroque' or 'Rococo'\?$"),
        ("ROCOCO", r"did you mean 'Rococo' or 'rococo'\?$"),
        ("xyz", r"there are 'Baroque', 'Cubism, late', 'Rococo', 'rococo' .of styles with model.classes_min_images"),
        ("", "there are 'Baroque'"),
    ],
)
def test_an_unknown_class_brings_the_nearest_names(asked: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        STYLES.find(asked)


def test_a_list_may_have_names_with_commas() -> None:
    assert STYLES.parse("rococo,Cubism, late, baroque") == [4, 2, 1]
    assert STYLES.parse("BAROQUE,cubism, LATE,unlabelled") == [1, 2, 0]
    with pytest.raises(UserError, match="--classes: no class 'Cubism'"):
        STYLES.parse("Baroque,Cubism")


def test_draws_have_the_frequencies_of_the_dataset_and_their_own_key() -> None:
    classes = Classes(("a", "b"), (50, 0, 150))
    drawn = classes.draw(4000, 3)
    assert torch.equal(drawn, classes.draw(4000, 3)) and not torch.equal(drawn, classes.draw(4000, 4))
    counts = torch.bincount(drawn, minlength=3).tolist()
    assert counts[1] == 0 and abs(counts[0] - 1000) < 150
    # not a function of the latents' own numbers: what one seed draws of both is unrelated
    latents = torch.randn(4000, generator=torch.Generator().manual_seed(3))
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(3))
    for numbers in (latents, uniform):
        both = torch.stack([numbers.double(), drawn.double()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.06


def test_one_hot_rows_are_torchs() -> None:
    labels = torch.tensor([0, 3, 1])
    assert torch.equal(one_hot(labels, 3), torch.nn.functional.one_hot(labels, 4).float())


def test_lists_that_differ_are_told_apart() -> None:
    one, other = Classes(("a", "b")), Classes(("b", "c", "d"))
    assert one.unlike(Classes(("a", "b"), (1, 2, 3))) is None
    assert one.unlike(other) == "2 classes there and 3 here (only there: 'a'; only here: 'c', 'd')"
    assert one.unlike(Classes(("b", "a"))) == "2 classes there and 2 here (in another order)"


def test_the_largest_classes_keep_their_order() -> None:
    assert STYLES.largest(2) == [1, 3] and STYLES.largest(9) == [1, 2, 3, 4]

"""A run of a game with classes: from labelled shards to a checkpoint that names them, and on from there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gan_dist.data.classes import Classes
from gan_dist.model.initialise import initialise
from gan_dist.model.networks import CLASS_DIM, Discriminator, Generator
from gan_dist.report.report import make_report
from gan_dist.runs.checkpoint import find
from gan_dist.sampling.generate import generate, load_generator
from gan_dist.training.draws import draw_dropped
from gan_dist.training.trainer import train
from gan_dist.training.update import LABEL_DROPOUT
from gan_dist.utils.errors import UserError
from gan_dist.utils.pictures import from_pil, grid
from tests.helpers.datasets import write_dataset
from tests.helpers.games import CPU, STYLES, game, labels, moves
from tests.helpers.server import Server
from tests.helpers.training import assert_identical, final_state, small

NAMES = ("baroque", "cubism", "rare")
LABELS = [(None, 0, 1, 1)[i % 4] for i in range(23)] + [2]
CLASSES = ["model.classes=dataset", "model.classes_min_images=5"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures: of two styles, without a label, and one of a style too rare to be a class."""
    folder = tmp_path_factory.mktemp("labelled")
    write_dataset(folder / "shards", (9, 15), labels=LABELS, classes=NAMES)
    return folder / "shards"


def test_it_continues_bit_for_bit_and_names_its_classes(labelled: Path, tmp_path: Path) -> None:
    words = [*CLASSES, "optim.d_steps=2", "train.ema_half_life_images=32", "train.ema_statistics=standing"]
    train(small(labelled), words, run_dir=tmp_path / "through", max_steps=5, console=False)
    train(small(labelled), words, run_dir=tmp_path / "cut", max_steps=2, console=False)
    train(small(labelled), words, run_dir=tmp_path / "cut", max_steps=5, console=False)
    assert_identical(tmp_path / "through", tmp_path / "cut")
    state = final_state(tmp_path / "cut")
    counts = [sum(label in (None, 2) for label in LABELS), LABELS.count(0), LABELS.count(1)]
    assert state["classes"] == {"names": ["baroque", "cubism"], "images": counts}
    assert state["generator"]["class_table"].shape == state["generator_ema"]["class_table"].shape == (3, CLASS_DIM)
    assert state["discriminator"]["class_table"].shape == (2, CLASS_DIM)
    assert state["discriminator"]["class_table"].abs().min() > 0  # they began as 0
    generator = load_generator(tmp_path / "cut")
    assert generator.classes.names == ("baroque", "cubism")
    latents = torch.randn(2, generator.latent_dim)
    unlabelled, cubism = (generator(generator.with_classes(latents, torch.full((2,), one))) for one in (0, 2))
    assert torch.equal(generator(latents), unlabelled) and not torch.equal(unlabelled, cubism)


def test_without_classes_labels_play_no_part(labelled: Path, tmp_path: Path) -> None:
    """Nor do the new keys: a run on the same images without labels ends with the same bits."""
    write_dataset(tmp_path / "shards", (9, 15))
    for name, shards in (("labelled", labelled), ("plain", tmp_path / "shards")):
        train(small(shards), run_dir=tmp_path / name, max_steps=2, console=False)
    assert_identical(tmp_path / "labelled", tmp_path / "plain")
    assert "classes" not in final_state(tmp_path / "plain")


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["model.classes_min_images=1"], r"model.classes_min_images was 5, now 1"),
        (["model.classes=none"], r"model.classes was dataset, now none"),
    ],
)
def test_a_run_keeps_its_classes(run: Path, labelled: Path, words: list[str], refused: str) -> None:
    with pytest.raises(UserError, match=refused):
        train(small(labelled), [*CLASSES, *words], run_dir=run, max_steps=2, console=False)


@pytest.fixture(scope="module")
def run(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("runs") / "run"
    train(small(labelled), CLASSES, run_dir=path, max_steps=1, console=False)
    return path


def test_it_draws_its_classes(run: Path, labelled: Path) -> None:
    """A row for each class, a column for each latent, the same ones at every step; names to the left."""
    with Image.open(run / "samples" / "classes-00000001.png") as picture:
        page = from_pil(picture)
    generator, latents = load_generator(run), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    rows = [generate(generator, generator.with_classes(latents, torch.full((4,), label))) for label in (1, 2)]
    assert torch.equal(page[:, :, -4 * 34 - 2 :], grid(torch.cat(rows), 4))
    assert page[:, :34, : -4 * 34 - 2].min() < 128  # a name
    events = EventAccumulator(str(run / "tensorboard"), {"images": 0}).Reload()
    assert [each.step for each in events.Images("samples/classes")] == [0, 1]
    make_report(run)
    assert "A row of generated images for each class" in (run / "report.html").read_text()


def test_another_list_of_classes_is_refused_in_a_line(
    run: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other: dict[str, Any] = {"labels": LABELS, "classes": ("baroque", "dada", "rare")}
    write_dataset(tmp_path / "other", (9, 15), **other)
    words = "2 classes there and 2 here \\(only there: 'cubism'; only here: 'dada'\\); the classes must be the same"
    with pytest.raises(UserError, match=words):
        train(small(tmp_path / "other"), CLASSES, run_dir=tmp_path / "new", from_run=str(run), console=False)
    train(small(labelled), [*CLASSES, "optim.g_lr=1e-3"], run_dir=tmp_path / "new", from_run=str(run), max_steps=1,
          console=False)  # fmt: skip
    # one that came about in another way, from the same dataset and the same configuration
    monkeypatch.setattr("gan_dist.data.classes.choose_classes", lambda *_: Classes(("cubism", "baroque")))
    with pytest.raises(
        UserError, match=r"holds a run with other classes: .*in another order\); start a new run: gan-di"
    ):
        train(small(labelled), CLASSES, run_dir=run, max_steps=2, console=False)
    assert find(run).step == 1


def test_a_set_without_labels_is_refused_before_anything_is_written(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no labels: prepare it with --labels, or set model.classes=none"):
        train(small(dataset), CLASSES, run_dir=tmp_path / "run", console=False)
    assert not (tmp_path / "run").exists()


def test_a_missing_sidecar_is_named_before_anything_is_written(labelled: Path, tmp_path: Path) -> None:
    shutil.copytree(labelled, tmp_path / "set")
    (tmp_path / "set" / "shard-00001.jsonl").unlink()
    with pytest.raises(UserError, match=r"shard-00001.jsonl cannot be read \(No such file"):
        train(small(tmp_path / "set"), CLASSES, run_dir=tmp_path / "run", console=False)
    assert not (tmp_path / "run").exists()
    train(small(tmp_path / "set"), run_dir=tmp_path / "run", max_steps=1, console=False)  # which needs no labels


@pytest.mark.parametrize("window", [0, 1])
def test_from_an_address_it_is_the_game_of_the_local_set(labelled: Path, tmp_path: Path, window: int) -> None:
    words = [*CLASSES, f"data.window_shards={window}"]
    train(small(labelled), words, run_dir=tmp_path / "near", max_steps=4, console=False)
    with Server(labelled) as server:
        far = [*words, f"data.shards={server.address}", f"data.cache_dir={tmp_path / 'cache'}"]
        train(small(labelled), far, run_dir=tmp_path / "far", max_steps=4, console=False)
        assert {f"shard-0000{i}.jsonl" for i in range(2)} <= server.requests.keys()
    assert_identical(tmp_path / "near", tmp_path / "far")


def test_labels_are_dropped_by_position_for_the_whole_batch() -> None:
    whole = draw_dropped(3, 70, 4000, LABEL_DROPOUT, 0, 4000, CPU)
    assert 0.08 < float(whole.float().mean()) < 0.12
    parts = [draw_dropped(3, 70, 4000, LABEL_DROPOUT, lo, lo + 1000, CPU) for lo in range(0, 4000, 1000)]
    assert torch.equal(torch.cat(parts), whole) and not torch.equal(
        draw_dropped(3, 4070, 4000, 0.1, 0, 4000, CPU), whole
    )
    update = game(None, global_batch=4000, model={"classes": STYLES})
    rows = moves(update, 0)[3][0]
    (classes,) = labels(update, 0)
    assert classes is not None
    dropped = draw_dropped(7, 0, 4000, LABEL_DROPOUT, 0, 4000, CPU)
    assert torch.equal(rows.argmax(1), torch.where(dropped, 0, classes)) and torch.equal(rows.sum(1), torch.ones(4000))


def test_the_projection_is_the_papers() -> None:
    """Miyato and Koyama 2018, eq. 3, written as it stands there: a class adds v_c . phi(x); class 0 adds nothing."""
    discriminator = Discriminator(32, 4, num_classes=3).double().eval()
    initialise(discriminator, 0.1, torch.Generator().manual_seed(0))
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64) * 2 - 1
    rows = torch.eye(4, dtype=torch.float64)
    assert torch.equal(discriminator(images, 1, rows), discriminator(images))  # v = 0 is the unconditional game
    with torch.no_grad():
        discriminator.class_table.normal_()
    last = discriminator.get_submodule(f"conv{discriminator.depth}")
    phi: list[torch.Tensor] = []
    handle = discriminator.get_submodule(f"bn{discriminator.depth - 1}").register_forward_hook(
        lambda module, given, found: phi.append(found)
    )
    found = discriminator(images, 1, rows)
    handle.remove()
    numbers = last(phi[0]).flatten(1)
    table = torch.cat([torch.zeros(1, CLASS_DIM, dtype=torch.float64), discriminator.class_table])
    expected = numbers[:, 0] + (table * numbers[:, 1:]).sum(1) / CLASS_DIM**0.5
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_with_spectral_norm_a_class_cannot_make_the_discriminator_steeper() -> None:
    """Its table may grow without end; the logit's class part is bounded as the other layers are."""
    discriminator = Discriminator(32, 4, norm="spectral", num_classes=2).double().eval()
    initialise(discriminator, 0.1, torch.Generator().manual_seed(0))
    images, rows = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1, torch.eye(3, dtype=torch.float64)[1:]

    def part(table: torch.Tensor) -> torch.Tensor:
        """Returns what classes add to the logits."""
        with torch.no_grad():
            discriminator.class_table.copy_(table)
            with_classes, without = discriminator(images, 1, rows), discriminator(images)
        return torch.sub(with_classes, without)

    unit = torch.nn.functional.normalize(torch.randn(2, CLASS_DIM, dtype=torch.float64))
    full = part(unit * CLASS_DIM**0.5)
    for length in (0.0, 0.1, 1.0):
        torch.testing.assert_close(part(unit * CLASS_DIM**0.5 * length), length * full, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(part(unit * 1e6), full, rtol=1e-9, atol=0)


def test_vectors_of_classes_have_one_length_and_strength_goes_beyond_them() -> None:
    generator = Generator(32, 8, 4, classes=STYLES)
    initialise(generator, 0.1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        generator.class_table.mul_(7)
    plain, none, strong = (generator.vectors_of(torch.arange(3), w) for w in (1.0, 0.0, 1.5))
    torch.testing.assert_close(plain.square().sum(1), torch.ones(3))
    torch.testing.assert_close(none, plain[:1].expand(3, -1))
    torch.testing.assert_close(strong, plain[:1] + 1.5 * (plain - plain[:1]))

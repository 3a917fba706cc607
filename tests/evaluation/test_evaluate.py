"""gan-dist evaluate: the same figures on any number of ranks, what it says of collapse and copies, bad input."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from gan_dist.data.dataset import gather, open_dataset
from gan_dist.data.order import Order
from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.prepare.synthetic import paint_folder
from gan_dist.distributed.world import World, join
from gan_dist.evaluation import evaluate as evaluating
from gan_dist.evaluation import inception
from gan_dist.evaluation.evaluate import EvaluationOptions, _keep, evaluate_run
from gan_dist.evaluation.protocol import YOUNG_IMAGES, Evaluation, accuracy, warnings
from gan_dist.model.batchnorm import BatchNorm
from gan_dist.model.initialise import initialise
from gan_dist.model.networks import Generator
from gan_dist.runs.checkpoint import find, save
from gan_dist.runs.record import read_evaluations
from gan_dist.training.trainer import train
from gan_dist.utils.errors import GanDistError, UserError
from tests.helpers.ranks import run_ranks
from tests.helpers.training import small

SAMPLES = 120


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """130 paintings at 32x32: enough to speak of a distribution."""
    folder = tmp_path_factory.mktemp("many")
    paint_folder(folder / "paintings", 130)
    prepare([folder / "paintings"], folder / "shards", resolution=32, shard_samples=50)
    return folder / "shards"


@pytest.fixture(scope="module")
def run(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints of steps 0, 2 and 4, and an averaged generator."""
    path = tmp_path_factory.mktemp("runs") / "run"
    words = ["checkpoint.every_steps=2", "checkpoint.keep=5", "train.ema_half_life_images=64"]
    train(small(many), words, run_dir=path, max_steps=4, console=False)
    return path


class Copier(nn.Module):
    """A generator that knows some images by heart, and draws them in turn."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.known = images.float() / 127.5 - 1
        self.scale = nn.Parameter(torch.ones(()))
        self.drawn = 0

    def forward(self, latents: Tensor) -> Tensor:
        chosen = torch.arange(self.drawn, self.drawn + len(latents)) % len(self.known)
        self.drawn += len(latents)
        return self.known[chosen] * self.scale


def drawn_by(generator: nn.Module, dataset: Path) -> dict[str, Any]:
    with open_dataset(dataset) as real:
        figures = Evaluation(World(), real, SAMPLES)(generator, 8, averaged=False)
    assert figures is not None
    return figures


def test_a_generator_that_copies_is_near_and_is_found_out(many: Path) -> None:
    with open_dataset(many) as real:
        images = torch.cat([real.shard_view(shard) for shard in range(3)])
        copying = drawn_by(Copier(images), many)
        alike = drawn_by(Copier(images[:1]), many)
        fresh = Generator(32, 8, 4)
        initialise(fresh, 0.02, torch.Generator().manual_seed(0))
        untrained = drawn_by(fresh, many)
    assert copying["near_copies"] == 1 and copying["diversity"] == pytest.approx(1, abs=0.05)
    assert any("copies of real images" in line and "data.x_flip" in line for line in warnings(copying))
    assert alike["diversity"] == 0
    assert any("collapse" in line and "optim.g_lr" in line for line in warnings(alike))
    assert alike["repeated"] == 1 and copying["repeated"] < 0.2
    assert copying["swd"] < untrained["swd"] / 3
    assert untrained["near_copies"] == 0


def test_what_is_warned_of() -> None:
    sound = {"diversity": 0.9, "repeated": 0.01, "near_copies": 0.0, "images_seen": YOUNG_IMAGES}
    young = {**sound, "images_seen": YOUNG_IMAGES - 1}
    assert not warnings(sound, most_diverse=0.95)
    (line,) = warnings({**sound, "diversity": 0.4})
    assert "differ 40% as much as real images do: the generator collapses" in line and "optim.g_lr" in line
    assert not warnings({**young, "diversity": 0.4, "repeated": 0.9}, most_diverse=0.4)  # little is learned yet
    (line,) = warnings({**young, "diversity": 0.4}, most_diverse=0.7)  # but what was learned may be lost
    assert "do, after 70%: the generator collapses" in line
    (line,) = warnings({**sound, "repeated": 0.3})
    assert "30% of the samples looked at are nearly the same as another one" in line and "optim.g_lr" in line
    assert not warnings({**sound, "accuracy_training": 0.9, "accuracy_held_out": 0.8})
    (line,) = warnings({**sound, "accuracy_training": 0.9, "accuracy_held_out": 0.5})
    assert "knows 90% of the training images but 50% of the others" in line and "data.x_flip=true" in line


class Bright(nn.Module):
    """A discriminator that takes an image for real where it is brighter than its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchNorm(3)
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        brightness: Tensor = self.norm(images).mean((1, 2, 3))
        return brightness


def test_the_discriminator_is_judged_as_it_plays(tmp_path: Path) -> None:
    grey = [30 if index % 4 else 90 for index in range(200)]  # a quarter is bright, and none by a fixed measure
    (tmp_path / "greys").mkdir()
    for index, level in enumerate(grey):
        Image.new("RGB", (32, 32), (level, level, level)).save(tmp_path / "greys" / f"{index:03d}.png")
    prepare([tmp_path / "greys"], tmp_path / "shards", resolution=32)
    judge = Bright().eval()
    with open_dataset(tmp_path / "shards") as real:
        assert accuracy(judge, real, 200) == pytest.approx(0.25, abs=0.03)
    assert judge.batches == [64, 64, 64]  # whole ones, each normalised by itself


def test_the_published_distance_is_added_when_asked_for(many: Path) -> None:
    with open_dataset(many) as real:
        asked = Evaluation(World(), real, SAMPLES, published=True)
        images = torch.cat([real.shard_view(shard) for shard in range(3)])
        figures, faded = (asked(Copier(one), 8, averaged=False) for one in (images, 64 + images // 2))
    assert figures is not None and faded is not None
    assert figures["swd_progan"] == pytest.approx((figures["swd_progan_32"] + figures["swd_progan_16"]) / 2)
    assert figures["swd_progan"] < 30 and faded["swd"] > 3 * faded["swd_progan"]  # blind to contrast, as published
    assert "swd_progan" not in drawn_by(Copier(images), many)


def test_the_floor_is_how_far_real_images_are_from_others(tmp_path: Path) -> None:
    paint_folder(tmp_path / "paintings", 210)
    prepare([tmp_path / "paintings"], tmp_path / "shards", resolution=32)
    with open_dataset(tmp_path / "shards") as real:
        others = Order(real.shard_sizes, 0).indices(100, 200)
        figures = Evaluation(World(), real, 100, floor=True)(Copier(gather(real, others)), 8, averaged=False)
        with pytest.raises(UserError, match=r"--floor compares 106 real images with 106 others, but .* holds 210"):
            Evaluation(World(), real, 106, floor=True)
    assert (
        figures is not None and figures["swd_floor"] == pytest.approx(figures["swd"], rel=1e-6) and figures["swd"] > 1
    )


def test_an_empty_picture_is_no_copy_of_an_empty_picture(tmp_path: Path) -> None:
    paint_folder(tmp_path / "paintings", 130)
    for number, grey in enumerate((100, 128, 140)):
        Image.new("RGB", (40, 40), (grey, grey, grey)).save(tmp_path / "paintings" / f"empty-{number}.png")
    prepare([tmp_path / "paintings"], tmp_path / "shards", resolution=32)
    assert drawn_by(Copier(torch.full((1, 3, 32, 32), 129)), tmp_path / "shards")["near_copies"] == 0


def test_neither_the_generator_nor_random_numbers_are_disturbed(many: Path) -> None:
    generator = Generator(32, 8, 4).train()
    before, state = {k: v.clone() for k, v in generator.state_dict().items()}, torch.get_rng_state()
    cudnn: Any = torch.backends.cudnn
    convolutions = cudnn.conv
    precision, used = convolutions.fp32_precision, set()
    generator.register_forward_pre_hook(lambda *_: used.add(convolutions.fp32_precision))
    drawn_by(generator, many)
    # The same arithmetic whoever evaluates: training sets TF32 as its configuration says, torch allows it by default.
    assert used == {"ieee"} and convolutions.fp32_precision == precision
    assert generator.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


def test_it_can_be_called_off(many: Path) -> None:
    with open_dataset(many) as real:
        assert Evaluation(World(), real, SAMPLES)(Generator(32, 8, 4), 8, averaged=False, stopped=lambda: True) is None


def test_the_command_keeps_its_figures_with_their_protocol(run: Path, many: Path, dataset: Path) -> None:
    asked: dict[str, Any] = {"samples": SAMPLES, "inception": "none"}
    rows = evaluate_run(World(), run, EvaluationOptions(all_checkpoints=True, held_out=str(dataset), **asked))
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[-1]["protocol"]["samples"] == SAMPLES and rows[-1]["protocol"]["averaged"]
    with open_dataset(many) as real:
        assert rows[-1]["protocol"]["dataset"] == real.identity
        assert [row["epoch"] for row in rows] == [round(8 * row["step"] / real.num_samples, 2) for row in rows]
    with open_dataset(dataset) as others:
        assert rows[-1]["held_out"] == others.identity
    for again in (str(dataset), None):
        evaluate_run(World(), run, EvaluationOptions(**asked, held_out=again))
        assert json.dumps(rows) == json.dumps(read_evaluations(run))  # measured again: the same, in the same place
    (plain,) = evaluate_run(World(), run, EvaluationOptions(**asked, averaged=False))
    assert not plain["protocol"]["averaged"] and plain["swd"] != rows[-1]["swd"]
    (other,) = evaluate_run(World(), run, EvaluationOptions(**asked, seed=1))
    assert other["protocol"]["seed"] == 1 and other["swd"] != rows[-1]["swd"]
    assert [row["step"] for row in read_evaluations(run)] == [0, 2, 4, 4, 4]
    assert not list(run.glob(".evaluations*"))


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """110 paintings at 32x32 that no run here has learned from."""
    folder = tmp_path_factory.mktemp("unseen")
    paint_folder(folder / "paintings", 110, seed=7)
    prepare([folder / "paintings"], folder / "shards", resolution=32)
    return folder / "shards"


def evaluated(run: Path, **asked: Any) -> tuple[dict[str, Any], list[str]]:
    """Returns the newest checkpoint's figures by 110 samples, and the notes."""
    lines: list[str] = []
    options = EvaluationOptions(**{"samples": 110, "inception": "none", **asked})
    (row,) = evaluate_run(World(), run, options, lines.append)
    return row, [line for line in lines if line.startswith("note: ")]


def test_held_out_sets_are_kept_apart(run: Path, unseen: Path, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    rows = [evaluated(tmp_path / "run", held_out=str(one))[0] for one in (unseen, dataset)]
    assert rows[0]["protocol"] == rows[1]["protocol"] and rows[0]["held_out"] != rows[1]["held_out"]
    evaluated(tmp_path / "run")
    kept = read_evaluations(tmp_path / "run")
    assert [row for row in kept if row["protocol"] == rows[0]["protocol"]] == rows


def test_a_runs_own_set_tells_its_epochs_copies_and_training_images(
    run: Path, many: Path, unseen: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_dataset(many) as real:
        images = torch.cat([real.shard_view(shard) for shard in range(3)])
    monkeypatch.setattr(evaluating, "build_generator", lambda *_: Copier(images))
    own, notes = evaluated(run, held_out=str(dataset))
    assert notes == [] and own["near_copies"] == 1
    other, notes = evaluated(run, held_out=str(dataset), dataset=str(unseen))
    assert notes == [] and other["swd"] != own["swd"] and other["protocol"]["dataset"] != own["protocol"]["dataset"]
    assert [other[key] for key in LEARNED] == [own[key] for key in LEARNED]

    path = tmp_path / "run"
    shutil.copytree(run, path)
    (away := tmp_path / "away").mkdir()
    shutil.copytree(many, away / "many")
    re_address(path, str(away / "nowhere"))
    left, notes = evaluated(path, held_out=str(dataset), dataset=str(unseen))
    assert not LEARNED & set(left) and left["accuracy_held_out"] == own["accuracy_held_out"]
    assert len(notes) == 1 and f"not at hand ({away / 'nowhere'} is not a dataset" in notes[0]
    moved, notes = evaluated(path, held_out=str(dataset), dataset=str(away / "many"))  # it is known wherever it lies
    assert notes == [] and moved == own
    re_address(path, str(unseen))
    with open_dataset(many) as real, open_dataset(unseen) as unknown:
        words = (
            f"{unseen} has manifest {unknown.identity[:12]}, the run was trained on the one with {real.identity[:12]}"
        )
    changed, notes = evaluated(path, held_out=str(dataset))
    assert not LEARNED & set(changed) and "accuracy_held_out" in changed
    assert len(notes) == 1 and words in notes[0]


LEARNED = {"epoch", "near_copies", "accuracy_training"}


def re_address(run: Path, shards: str) -> None:
    """Lets the run's newest checkpoint say that it learned from `shards`."""
    found = find(run)
    state = {**found.state, "config": {**found.state["config"], "data": {"shards": shards}}}
    shutil.rmtree(found.path)
    save(run / "checkpoints", state, {"dataset": found.manifest["dataset"]}, keep=9)


def test_evaluations_at_once_lose_no_row(run: Path, tmp_path: Path) -> None:
    rows = [{"step": step, "swd": 1.0, "protocol": None} for step in range(60)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: _keep(tmp_path, row, pytest.fail), rows))
    assert read_evaluations(tmp_path) == rows


def test_bad_input_is_one_line(
    run: Path, many: Path, unseen: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    def refused(match: str, where: Path = run, **asked: Any) -> None:
        with pytest.raises(UserError, match=match):
            options = EvaluationOptions(**{"samples": SAMPLES, "inception": "none", **asked})
            evaluate_run(World(), where, options, lines.append)

    refused("^--samples: expected 100 or more for these metrics, found 10", samples=10, inception="auto")
    assert lines == []
    refused("^--samples: expected 130 or fewer, as many as .* holds, found 131", samples=131)
    refused("holds 130 images; these metrics need 2049 or more", inception="~/no", samples=None)
    refused("holds 66 images; these metrics need 100 or more", samples=None, dataset=str(dataset))
    for seed in (-1, 2**63, 10**25):
        refused(f"^--seed: expected a whole number from 0 to 9223372036854775807, found {seed}", seed=seed)
    refused("no run at", tmp_path / "nothing")
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    refused("has no checkpoints yet", tmp_path / "young")
    refused("has no checkpoints yet", tmp_path / "young", all_checkpoints=True)
    monkeypatch.setattr(inception, "FEWEST", 100)
    monkeypatch.setenv("HOME", str(tmp_path))
    refused(f"no Inception weights at {tmp_path}/no", inception="~/no")
    refused("variable UNSET_HERE is not set", inception="$UNSET_HERE/a.pth")
    big = tmp_path / "big"
    paint_folder(tmp_path / "few", 4)
    prepare([tmp_path / "few"], big, resolution=64)
    refused("holds 64x64 images, but .* draws 32x32 ones; name another --dataset", dataset=str(big))
    refused("holds 64x64 images, but .* draws 32x32 ones; name another --held-out", held_out=str(big))
    refused("^--held-out: .* was trained on .*; name a dataset that it has never seen", held_out=str(many))
    refused("^--held-out: .* was trained on", held_out=str(many), dataset=str(unseen), samples=110)


def test_a_damaged_checkpoint_is_left_out_and_a_small_set_is_compared_whole(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    torn = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.pt"
    torn.write_bytes(torn.read_bytes()[:100])
    lines: list[str] = []
    options = EvaluationOptions(inception="none")
    rows = evaluate_run(World(), tmp_path / "run", replace(options, all_checkpoints=True), lines.append)
    assert [row["step"] for row in rows] == [0, 4]
    assert any("left out: " in line and "state.pt has 100 bytes" in line for line in lines)
    assert any("holds 130 images, so 130 are compared, not 10000" in line for line in lines)
    with pytest.raises(GanDistError, match="has 100 bytes"):
        evaluate_run(World(), tmp_path / "run", replace(options, step=2))
    newest = tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json"
    newest.write_text("{}")
    lines.clear()
    (row,) = evaluate_run(World(), tmp_path / "run", options, lines.append)
    assert row["step"] == 0 and len([line for line in lines if "passed over" in line]) == 2


def evaluate_ranks(rank: int, run: str, out: str) -> None:
    with join("cpu") as world:
        rows = evaluate_run(world, run, EvaluationOptions(samples=SAMPLES, inception="none"))
        gathered = world.gather_objects(rows)
        assert all(row == rows for row in gathered), "ranks disagree"
        if rank == 0:
            (Path(out) / f"{world.size}.json").write_text(json.dumps(rows[0]))
    assert not dist.is_initialized()


@pytest.mark.chaos
def test_the_figures_are_the_same_on_one_two_and_three_ranks(run: Path, tmp_path: Path) -> None:
    for size in (1, 2, 3):
        run_ranks(size, evaluate_ranks, str(run), str(tmp_path))
    one, *others = (json.loads((tmp_path / f"{size}.json").read_text()) for size in (1, 2, 3))
    for other in others:
        assert other.pop("protocol") == one["protocol"]
        assert other == pytest.approx({k: v for k, v in one.items() if k != "protocol"}, rel=1e-5)


def evaluate_with_a_stray(rank: int, run: str, elsewhere: str) -> None:
    with join("cpu") as world:
        with pytest.raises(UserError, match="is not a dataset"):
            stray = elsewhere if rank == 1 else None
            evaluate_run(world, run, EvaluationOptions(samples=SAMPLES, dataset=stray, inception="none"))
        with open_dataset(find(Path(run)).state["config"]["data"]["shards"]) as real:
            evaluation = Evaluation(world, real, SAMPLES)
            if rank == 1:
                evaluation._reals = no_disk  # type: ignore[method-assign]
            with pytest.raises(OSError, match="the disk is gone"):
                evaluation(Generator(32, 8, 4), 8, averaged=False)


def no_disk(lo: int, hi: int) -> Tensor:
    raise OSError("the disk is gone")


@pytest.mark.chaos
def test_no_rank_waits_for_one_that_cannot_read(run: Path, tmp_path: Path) -> None:
    run_ranks(2, evaluate_with_a_stray, str(run), str(tmp_path / "nowhere"))

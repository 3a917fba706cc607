"""The encoder that a dataset gives: its loss, its views, its file, and the figures on its features."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gan_dist.data.dataset import open_dataset
from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.prepare.synthetic import paint_folder
from gan_dist.data.prepare.verify import verify
from gan_dist.distributed.world import World, join
from gan_dist.evaluation import encoder
from gan_dist.evaluation.encoder import contrastive_loss, load_encoder, make_encoder, views
from gan_dist.evaluation.evaluate import EvaluationOptions, evaluate_run
from gan_dist.evaluation.protocol import Evaluation
from gan_dist.runs.metrics_file import read_metrics
from gan_dist.runs.record import read_run
from gan_dist.training.trainer import train
from gan_dist.utils.errors import UserError
from tests.evaluation.test_evaluate import Copier
from tests.helpers.ranks import run_ranks
from tests.helpers.training import small

CPU = torch.device("cpu")
SAMPLES = 256


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """280 paintings at 32x32, and the encoder that learned from them."""
    folder = tmp_path_factory.mktemp("painted")
    paint_folder(folder / "paintings", 280)
    prepare([folder / "paintings"], folder / "shards", resolution=32, shard_samples=150)
    with open_dataset(folder / "shards") as real:
        assert make_encoder(real, folder / "shards" / encoder.FILE, 4 * encoder.BATCH, 0, CPU)
    return folder / "shards"


def reals(shards: Path) -> Tensor:
    with open_dataset(shards) as real:
        return torch.cat([real.shard_view(shard) for shard in range(len(real.shard_sizes))])


def figures(shards: Path, drawn: Tensor, world: World | None = None, **more: Any) -> dict[str, Any]:
    with open_dataset(shards) as real:
        chosen = load_encoder(shards / encoder.FILE, 32, CPU)
        found = Evaluation(world or World(), real, SAMPLES, encoder=chosen, **more)(Copier(drawn), 8, averaged=False)
    assert found is not None
    return found


def test_the_loss_is_that_of_the_paper() -> None:
    """Chen et al. 2020, eq. 1, written as it stands there."""
    source = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 3, generator=source, dtype=torch.float64) for _ in range(2))
    rows = [*a, *b]

    def likeness(i: int, k: int) -> float:
        cosine = float(rows[i] @ rows[k] / (rows[i].norm() * rows[k].norm()))
        return math.exp(cosine / encoder.TEMPERATURE)

    pairs = [(i, (i + 5) % 10) for i in range(10)]
    losses = [-math.log(likeness(i, j) / sum(likeness(i, k) for k in range(10) if k != i)) for i, j in pairs]
    assert float(contrastive_loss(a, b)) == pytest.approx(sum(losses) / 10, rel=1e-12)


def test_views_are_keyed_parts_of_their_own_picture() -> None:
    """Each picture a tilted plane of one colour: whatever part, mirror and light, its view lies in its own range."""
    count, side = 64, 32
    ramp = torch.linspace(-0.02, 0.02, side)
    level = torch.linspace(-0.9, 0.9, count)[:, None, None, None]
    images = (level + ramp).expand(count, 3, side, side).contiguous()
    first, again = (views(images, torch.Generator().manual_seed(3)) for _ in range(2))
    other = views(images, torch.Generator().manual_seed(4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == images.shape and float(first.abs().max()) <= 1
    slope = (first[..., -1] - first[..., 0]).mean((1, 2))
    assert (slope < 0).any() and (slope > 0).any()  # some are mirrored
    light = (first.mean((1, 2, 3)) + 1) / (level.flatten() + 1)
    assert float(light.min()) > 1 - encoder.JITTER - 0.3 and float(light.max()) < 1 + encoder.JITTER + 0.3


def test_one_dataset_has_one_encoder(shards: Path, tmp_path: Path) -> None:
    kept = (shards / encoder.FILE).read_bytes()
    with open_dataset(shards) as real:
        assert not make_encoder(real, shards / encoder.FILE, 4 * encoder.BATCH, 0, CPU)
        with pytest.raises(UserError, match="is not this encoder; name another --out"):
            make_encoder(real, shards / encoder.FILE, 4 * encoder.BATCH, 1, CPU)
        assert make_encoder(real, tmp_path / "again.safetensors", 4 * encoder.BATCH, 0, CPU)
        assert make_encoder(real, tmp_path / "other.safetensors", 4 * encoder.BATCH, 1, CPU)
        with pytest.raises(UserError, match=r"expected a file name ending in .safetensors, found encoder.pt"):
            make_encoder(real, tmp_path / "encoder.pt", encoder.BATCH, 0, CPU)
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"cannot write .*; name another --out"):  # and hours are not spent before
            make_encoder(real, tmp_path / "file" / "encoder.safetensors", 10**9, 0, CPU)
    assert (shards / encoder.FILE).read_bytes() == kept
    files = (shards / encoder.FILE, tmp_path / "again.safetensors", tmp_path / "other.safetensors")
    one, again, other = (load_encoder(file, 32, CPU).weights for file in files)
    assert one == again != other
    verify(shards)  # what lies beside the shards is no fault of theirs


def test_what_holds_no_encoder_is_named(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    for file in (tmp_path / "text.safetensors", tmp_path / "nowhere.safetensors"):
        with pytest.raises(UserError, match="holds no encoder"):
            load_encoder(file, 32, CPU)
    with pytest.raises(UserError, match="an encoder of 32-pixel images, and these have 64; `gan-dist enc"):
        load_encoder(shards / encoder.FILE, 64, CPU)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((shards / encoder.FILE).read_bytes()[:-100])
    with pytest.raises(UserError, match="holds no encoder"):
        load_encoder(cut, 32, CPU)


def test_the_further_from_the_real_images_the_larger_the_distance(shards: Path) -> None:
    images = reals(shards)
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=source)
    noisy = [(images + scale * noise).clamp(0, 255).to(torch.uint8) for scale in (0, 10, 60)]
    rows = [figures(shards, one) for one in (*noisy, images[:8])]
    distances = [row["feature_distance"] for row in rows]
    assert distances[0] < distances[1] < distances[2]
    assert rows[0]["feature_precision"] > 0.9 and rows[0]["feature_recall"] > 0.9
    # A generator of eight good pictures is precise, and has little of what there is.
    assert distances[3] > distances[0] and rows[3]["feature_precision"] > 0.9 and rows[3]["feature_recall"] < 0.5


def test_any_number_of_ranks_finds_the_same(shards: Path, tmp_path: Path) -> None:
    alone = figures(shards, reals(shards).flip(-1))
    run_ranks(3, on_a_rank, str(shards), str(tmp_path))
    for rank in range(3):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == pytest.approx({key: alone[key] for key in found}, rel=1e-4) and len(found) == 3


def on_a_rank(rank: int, shards: str, out: str) -> None:
    with join("cpu") as world:
        lo, hi = rank * SAMPLES // world.size, (rank + 1) * SAMPLES // world.size
        found = figures(Path(shards), reals(Path(shards)).flip(-1)[lo:hi], world)
    found = {key: value for key, value in found.items() if key.startswith("feature")}
    (Path(out) / f"{rank}.json").write_text(json.dumps(found))


def test_a_dataset_with_an_encoder_is_evaluated_with_it(shards: Path, tmp_path: Path) -> None:
    words = ["evaluate.every_steps=2", f"evaluate.samples={SAMPLES}"]
    config = small(shards)
    for name, more in (("with", []), ("without", ["evaluate.encoder=none"])):
        train(config, [*words, *more], run_dir=tmp_path / name, max_steps=2, console=False)
    lines = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in ("with", "without")}
    tags = {name: {tag for line in found for tag in line} for name, found in lines.items()}
    assert "evaluate/feature_distance" in tags["with"] and "evaluate/feature_distance" not in tags["without"]
    # The encoder does not change which rows compare by swd: figures of both merge into one row.
    options = EvaluationOptions(step=2, samples=SAMPLES, inception="none")
    (row,) = evaluate_run(World(), tmp_path / "without", options)
    assert row["protocol"]["encoder"] and row["feature_distance"] > 0
    merged = [one for one in read_run(tmp_path / "without").evaluations if one["step"] == 2]
    assert len(merged) == 1 and merged[0]["feature_distance"] == row["feature_distance"]


def test_too_few_samples_are_a_note_or_a_mistake(shards: Path, tmp_path: Path) -> None:
    train(small(shards), run_dir=tmp_path / "run", max_steps=1, console=False)
    notes: list[str] = []
    options = EvaluationOptions(samples=200, inception="none")
    (row,) = evaluate_run(World(), tmp_path / "run", options, notes.append)
    assert "feature_distance" not in row and any("is not used: its figures need 256 samples" in note for note in notes)
    chosen = EvaluationOptions(samples=200, inception="none", encoder=str(shards / encoder.FILE))
    with pytest.raises(UserError, match="--encoder: its figures need 256 samples or more, found 200"):
        evaluate_run(World(), tmp_path / "run", chosen)


def test_few_images_teach_nothing(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "few")
    with open_dataset(tmp_path / "few") as real, pytest.raises(UserError, match="an encoder needs 256 or more"):
        make_encoder(real, tmp_path / "few" / encoder.FILE, 1000, 0, CPU)
    assert not (tmp_path / "few" / encoder.FILE).exists()

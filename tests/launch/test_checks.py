"""What is refused before a job waits in the queue, and what is left to the nodes."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections import namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from gan_dist.config.schema import Config, load_config
from gan_dist.data.classes import Classes
from gan_dist.distributed.world import World
from gan_dist.model.networks import build_discriminator, build_generator
from gan_dist.training.update import Update
from gan_dist.utils.errors import GanDistError, UserError
from launch import checks, slurm
from launch.options import load_cluster
from tests.helpers.training import flat

SIZE = ["model.resolution=32", "model.g_channels=8", "model.d_channels=8", "model.latent_dim=16"]


def settings(shards: object, *words: str) -> Config:
    return load_config({"data": {"shards": str(shards)}}, [*SIZE, *words])


def test_a_dataset_is_looked_at_before_the_queue_wherever_it_is(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = checks.check_dataset(settings(dataset))
    assert len(identity) == 64 and identity == checks.check_dataset(
        settings(f"pipe:cat {shlex.quote(str(dataset))}/{{}}")
    )
    checks.check_dataset(settings(f"file://{dataset}"))
    with pytest.raises(UserError, match="nowhere is not a dataset: no readable manifest"):
        checks.check_dataset(settings(tmp_path / "nowhere"))
    with pytest.raises(
        UserError, match=r"model\.resolution is 64, but .* holds 32x32 images; set model\.resolution=32"
    ):
        checks.check_dataset(settings(dataset, "model.resolution=64"))
    broken = tmp_path / "set"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest"):
        checks.check_dataset(settings(broken))
    assert not capsys.readouterr().err
    assert not checks.check_dataset(settings("pipe:false {}"))  # it may answer from the nodes
    assert "the nodes will try again" in capsys.readouterr().err


def test_a_dataset_has_what_a_run_asks_of_it(dataset: Path, tmp_path: Path) -> None:
    few = checks.find_manifest(settings(dataset))
    assert few is not None
    held = replace(few, shards=tuple(replace(shard, samples=10 * shard.samples) for shard in few.shards))
    number, fits = held.num_samples, partial(settings, dataset, "evaluate.every_steps=5")
    checks.check_fit(fits(f"evaluate.samples={number}"), held)
    checks.check_fit(settings(dataset, f"evaluate.samples={number + 1}"), few)  # nothing is evaluated
    for manifest, words, line in (
        (held, [f"evaluate.samples={number + 1}"], rf"evaluate\.samples: expected {number} or fewer, .* {number + 1}$"),
        (held, ["evaluate.samples=99"], r"^evaluate\.samples: expected 100 or more for these metrics, found 99$"),
        (few, ["evaluate.samples=100"], rf"holds {few.num_samples} images; these metrics need 100 or more"),
        (held, ["evaluate.encoder=/nope"], r"^evaluate\.encoder: /nope is no file; `gan-dist encoder"),
        (held, [f"evaluate.encoder={__file__}", "evaluate.samples=100"], r"^evaluate\.samples: expected 256 or more"),
        (held, [f"evaluate.held_out={tmp_path}", "evaluate.samples=100"], re.escape(str(tmp_path))),
    ):
        with pytest.raises(UserError, match=line):
            checks.check_fit(fits(*words), manifest)
    with pytest.raises(UserError, match="has no labels: prepare it with --labels"):
        checks.check_fit(settings(dataset, "model.classes=dataset"), replace(held, classes=(), totals={}))
    labelled = replace(held, classes=("a", "b"), totals={"classes": {"a": 3, "b": 5}})
    checks.check_fit(settings(dataset, "model.classes=dataset", "model.classes_min_images=5"), labelled)
    with pytest.raises(UserError, match=r"classes_min_images is 6, but the largest class .*, 'b', has 5 images"):
        checks.check_fit(settings(dataset, "model.classes=dataset", "model.classes_min_images=6"), labelled)
    unsaid = replace(labelled, totals={})  # an older manifest does not count
    checks.check_fit(settings(dataset, "model.classes=dataset", "model.classes_min_images=6"), unsaid)


def test_an_interpreter_that_cannot_run_gan_dist_is_refused(tmp_path: Path) -> None:
    checks.check_interpreter(load_cluster(None, [f"job.python={sys.executable}"]))
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/bash\nexec {sys.executable} -IS "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(UserError, match=r"^job\.python: .*/python cannot run gan_dist: .*has no module torch"):
        checks.check_interpreter(load_cluster(None, [f"job.python={bare}"]))
    for words in (["job.container=env"], ["job.setup=[module load python]"], ["job.python=/opt/of/the/nodes"]):
        checks.check_interpreter(load_cluster(None, [f"job.python={bare}", *words]))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["slurm.nodes=2", "slurm.gres=gpu:a100.80:4", "slurm.cpus_per_task=8"], ""),
        (["slurm.nodes=2-9", "slurm.gpus_per_node=4"], ""),
        (["slurm.nodes=5"], ""),
        (["slurm.partition=cpu", "slurm.nodes=4", "slurm.cpus_per_task=64"], ""),
        (["slurm.partition=nowhere", "slurm.nodes=99"], ""),  # sbatch knows better
        (["slurm.nodes=99", "slurm.extra={nodelist: n1}"], ""),
        (
            ["slurm.nodes=3", "slurm.gpus_per_node=4"],
            "slurm.nodes: expected at most 2 node(s) with 16 processors (slurm.cpus_per_task x 4 rank(s)) and 4 GPUs, "
            "found 3; partition by default has 2 of 32 processors and 4 GPUs, 3 of 16 processors",
        ),
        (["slurm.partition=cpu", "slurm.gpus_per_node=1"], "expected at most 0 node(s) with 4 processors"),
        (["slurm.cpus_per_task=33"], "expected at most 0 node(s) with 33 processors"),
    ],
)
def test_a_shape_that_no_nodes_have_is_refused(words: list[str], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "2|32|gpu:a100.80:4(S:0-1)|gpu*\n3|16|(null)|gpu*\n4|64+|(null)|cpu\n"
    monkeypatch.setattr(slurm, "run", lambda *words, **more: shown)
    monkeypatch.setattr(slurm, "config", lambda key: "no")
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    options = load_cluster(None, words).slurm
    if not line:
        checks.check_partition(options)
    else:
        with pytest.raises(UserError) as caught:
            checks.check_partition(options)
        assert line in str(caught.value)
        monkeypatch.setattr(slurm, "config", lambda key: "all")  # then sbatch says it in its own words
        checks.check_partition(options)


def test_a_disk_without_room_for_two_checkpoints_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_disk(settings("x"), tmp_path / "deep" / "run")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(60 * 2**20))
    checks.check_disk(settings("x"), tmp_path / "deep" / "run")
    with pytest.raises(UserError, match=rf"^{tmp_path} has 60 MiB free, but the code and two checkpoints take \d+ "):
        checks.check_disk(load_config({"data": {"shards": "x"}}), tmp_path / "deep" / "run")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train.ema_half_life_images=100"],
        ["model.blocks=residual", "model.d_norm=spectral", "model.minibatch_std=true", "model.upsample=nearest"],
        ["model.classes=dataset"],
        ["model.resolution=128", "model.max_channels=16"],
    ],
)
def test_the_size_of_a_checkpoint_is_what_it_takes(words: list[str]) -> None:
    config = settings("x", *words)
    classes = Classes(tuple(map(str, range(checks.MANY))) if config.model.classes == "dataset" else ())
    described = config.model.model_dump()
    update = Update(
        build_generator(described, classes), build_discriminator(described, classes), world=World(), global_batch=8
    )
    state = update.state_dict()
    state |= {"generator_ema": state["generator"]} if config.train.ema_half_life_images else {}
    taken = sum(tensor.nbytes for tensor in flat(state).values())
    assert abs(checks.checkpoint_bytes(config) / taken - 1) < 0.03, taken  # running statistics, counts of steps


def test_a_cluster_that_does_not_answer_is_sbatchs_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*words: str, **more: object) -> str:
        raise GanDistError("sinfo failed")

    monkeypatch.setattr(slurm, "run", silent)
    monkeypatch.setattr(slurm, "config", lambda key: "")
    checks.check_partition(load_cluster(None, ["slurm.nodes=99"]).slurm)

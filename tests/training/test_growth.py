"""A run at more pixels from one at fewer: what is taken over, what is fresh, and what cannot grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gan_dist.config.schema import load_config
from gan_dist.model.growth import misfit
from gan_dist.model.networks import Generator
from gan_dist.runs.checkpoint import find
from gan_dist.training.trainer import train
from gan_dist.utils.errors import UserError
from tests.helpers.datasets import write_dataset
from tests.helpers.training import assert_identical, small

KINDS: dict[str, list[str]] = {
    "thesis": [],
    "kit": [
        *("model.upsample=nearest", "model.d_norm=spectral", "model.blocks=residual", "model.minibatch_std=true"),
        "train.ema_half_life_images=64",
    ],
    "none": ["model.d_norm=none", "train.precision=fp64"],
}


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("larger")
    write_dataset(root / "64", (9, 7), 64)
    return root / "64"


def grown(dataset: Path, *words: str, parent: Path | str, run_dir: Path, **more: Any) -> Any:
    """Trains two steps of a run at 64 pixels, half as wide, from `parent`."""
    widths = ["model.resolution=64", "model.g_channels=2", "model.d_channels=2"]
    options = {"from_run": str(parent), "max_steps": 2, "console": False, **more}
    return train(small(dataset), [*widths, *words], run_dir=run_dir, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_the_same_side_are_taken_over(kind: str, dataset: Path, larger: Path, tmp_path: Path) -> None:
    words = KINDS[kind]
    train(small(dataset), words, run_dir=tmp_path / "parent", max_steps=3, console=False)
    grown(larger, *words, parent=tmp_path / "parent", run_dir=tmp_path / "child")
    old, new = find(tmp_path / "parent").state, find(tmp_path / "child", 0).state
    assert new["step"] == new["images_seen"] == 0
    # What reads or makes images is fresh, and nothing else of the old networks is lost: G's 4x4 to 16x16 pixels, D's
    # the same, whose numbers moved by one.
    assert_taken(old["generator"], new["generator"], last_of_g(old["generator"]), 0)
    assert_taken(old["discriminator"], new["discriminator"], "conv1.", 1)
    if kind == "kit":
        assert_taken(old["generator_ema"], new["generator_ema"], last_of_g(old["generator"]), 0)
        assert not torch.equal(old["generator_ema"]["convt2.weight"], old["generator"]["convt2.weight"])
        assert torch.equal(new["generator_ema"]["convt5.weight"], new["generator"]["convt5.weight"])
        last = find(tmp_path / "child").state  # fresh weights are forgotten as a new run forgets its first ones
        moved, left = (
            last[name]["convt5.weight"] - new["generator"]["convt5.weight"] for name in ("generator", "generator_ema")
        )
        assert left.norm() > 0.5 * moved.norm()
    for optimizer in ("optimizer_g", "optimizer_d"):
        assert all(not moment.any() for each in new[optimizer]["state"].values() for moment in each.values())
    assert find(tmp_path / "child").manifest["parent"] == f"{tmp_path / 'parent'}@3"
    assert find(tmp_path / "child").manifest["grown_from"] == 32


def test_a_run_with_classes_grows_with_their_tables(tmp_path: Path) -> None:
    words = ["model.classes=dataset", "model.classes_min_images=2", "train.ema_half_life_images=64"]
    for name, side, classes in (("32", 32, "ab"), ("64", 64, "ab"), ("other", 64, "ac"), ("turned", 64, "ba")):
        labels = [(0, 1, None)[i % 3] for i in range(16)]
        write_dataset(tmp_path / name, (9, 7), side, labels=labels, classes=tuple(classes))
    train(small(tmp_path / "32"), words, run_dir=tmp_path / "parent", max_steps=3, console=False)
    grown(tmp_path / "64", *words, parent=tmp_path / "parent", run_dir=tmp_path / "child")
    old, new = find(tmp_path / "parent").state, find(tmp_path / "child", 0).state
    assert new["classes"]["names"] == ["a", "b"]
    for name in ("generator", "generator_ema"):
        assert_taken(old[name], new[name], last_of_g(old[name]), 0)
    assert_taken(old["discriminator"], new["discriminator"], "conv1.", 1)
    for name in ("generator", "generator_ema", "discriminator"):  # which began as 0 in D, and have moved since
        assert new[name]["class_table"].any() and torch.equal(new[name]["class_table"], old[name]["class_table"])
    last = find(tmp_path / "child").state["discriminator"]["class_table"]
    assert not torch.equal(last, new["discriminator"]["class_table"]), "and it learns"
    for shards, said in (("other", "only there: 'b'; only here: 'c'"), ("turned", "in another order")):
        with pytest.raises(UserError, match=rf"^--from .*parent: 2 classes there and 2 here \({said}\); the .* name$"):
            grown(tmp_path / shards, *words, parent=tmp_path / "parent", run_dir=tmp_path / shards / "child")
        assert not (tmp_path / shards / "child").exists()
    with pytest.raises(UserError, match=r"^--from .*: model\.classes is dataset there and none here"):
        grown(tmp_path / "64", parent=tmp_path / "parent", run_dir=tmp_path / "without")


def last_of_g(state: dict[str, torch.Tensor]) -> str:
    return f"convt{sum(name.startswith('convt') for name in state)}."


def assert_taken(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor], image_layer: str, moved: int) -> None:
    """Every tensor of `old`, but for the layer next to the image, is in `new` under its name with a higher number."""
    kept = {name: value for name, value in old.items() if not name.startswith(image_layer)}
    assert len(kept) > 3
    names = {
        name: "".join(str(int(c) + moved) if c.isdigit() and i < 7 else c for i, c in enumerate(name)) for name in kept
    }
    assert [name for name in kept if not torch.equal(new[names[name]], kept[name])] == []
    fresh = new.keys() - set(names.values())
    for name in fresh:  # the seed's numbers, as a run without a parent has them
        assert new[name].dim() < 2 or new[name].std() > 0


def test_taken_layers_give_the_maps_that_they_gave(dataset: Path, larger: Path, tmp_path: Path) -> None:
    """By the networks' own functions, whatever the layers are called."""
    train(small(dataset), run_dir=tmp_path / "parent", max_steps=3, console=False)
    grown(larger, parent=tmp_path / "parent", run_dir=tmp_path / "child")
    states = find(tmp_path / "parent").state, find(tmp_path / "child", 0).state
    maps: list[list[torch.Tensor]] = []
    latents = torch.randn(3, 8)
    for state, side, width in zip(states, (32, 64), (4, 2), strict=True):
        generator = Generator(side, 8, width).eval()
        generator.load_state_dict(state["generator"])
        seen: list[torch.Tensor] = []
        for module in generator.children():
            module.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        generator(latents)
        maps.append(seen[:3])
    assert [each.shape[2] for each in maps[0]] == [4, 8, 16]
    for old, new in zip(*maps, strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


def test_it_is_said_and_goes_on_as_any_run_does(
    dataset: Path, larger: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train.ema_half_life_images=64"]
    train(small(dataset), words, run_dir=tmp_path / "parent", max_steps=2, console=False)
    grown(larger, *words, parent=tmp_path / "parent", run_dir=tmp_path / "whole", max_steps=4, console=True)
    said = capfd.readouterr().out
    assert (
        "note: generator grown from 32 to 64 pixels: bn1 to bn3, convt1 to convt3 taken over, "
        "bn4, convt4 to convt5 fresh, its optimiser too\n"
    ) in said
    assert "note: discriminator grown from 32 to 64 pixels: bn3 to bn4, conv3 to conv5 taken over, bn2, conv1" in said
    for steps in (1, 3, 4):
        grown(larger, *words, parent=tmp_path / "parent", run_dir=tmp_path / "parts", max_steps=steps)
    assert_identical(tmp_path / "whole", tmp_path / "parts")
    capfd.readouterr()
    grown(larger, *words, parent=tmp_path / "parent", run_dir=tmp_path / "whole", max_steps=5, console=True)
    assert "grown" not in capfd.readouterr().out, "it grew once"


def model(resolution: int, **keys: Any) -> dict[str, Any]:
    section = {"resolution": resolution, **keys}
    both = section.pop("channels", None)
    section |= {"g_channels": both, "d_channels": both} if both else {}
    described: dict[str, Any] = load_config({"data": {"shards": "x"}, "model": section}).to_dict()["model"]
    return described


THESIS = model(64)
CAPPED = model(64, channels=128, max_channels=512)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (THESIS, THESIS),
        (THESIS, model(64, init="he", max_channels=512)),
        (THESIS, model(128, channels=32)),
        (THESIS, model(256, channels=16, max_channels=512)),
        (CAPPED, model(128, max_channels=512)),
        (model(32, g_channels=3, max_channels=3), model(64, channels=3, max_channels=3)),
        (model(128, max_channels=512), model(256, channels=32, max_channels=512)),
    ],
)
def test_what_fits(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert misfit(old, new) is None


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (THESIS, model(32), "model.resolution is 64 there and 32 here; a run grows to more pixels, never to fewer"),
        (THESIS, model(64, max_channels=256), "model.max_channels is None there and 256 here; the networks' shapes"),
        (THESIS, model(128), "here; set model.g_channels=32 model.d_channels=32"),
        (THESIS, model(128, max_channels=64), "set model.g_channels=32 model.d_channels=32 model.max_channels=null"),
        (CAPPED, model(128), "the generator has 512, 512, 256, 128 channels from 4x4 pixels on there and 1024, 512,"),
        (CAPPED, model(128), "256, 128, 64 here; set model.max_channels=512"),
        (model(64, d_channels=32), model(128, channels=32), "the discriminator has 256, 128, 64, 32 channels"),
        (model(64, g_channels=5), model(128), "no widths here would fit those"),
        (THESIS, model(128, upsample="nearest"), "model.upsample is transposed there and nearest here"),
        (THESIS, model(128, latent_dim=9), "model.latent_dim is 100 there and 9 here"),
    ],
)
def test_what_cannot_grow_is_one_line_with_what_would(old: dict[str, Any], new: dict[str, Any], words: str) -> None:
    line = misfit(old, new)
    assert line and words in line and "\n" not in line


def test_a_refusal_leaves_nothing_behind(dataset: Path, larger: Path, tmp_path: Path) -> None:
    train(small(dataset), run_dir=tmp_path / "parent", max_steps=1, console=False)
    with pytest.raises(
        UserError, match=r"--from .*parent: a run of 32 pixels grows to 64 where .*set model\.g_channels=2"
    ):
        grown(larger, "model.g_channels=4", parent=tmp_path / "parent", run_dir=tmp_path / "child")
    assert not (tmp_path / "child").exists()

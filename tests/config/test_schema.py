"""Configuration: what is read, what is refused, and in which words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from gan_dist.config.base import known_keys
from gan_dist.config.diff import change_rule, changes
from gan_dist.config.schema import PRESETS, Config, load_config, preset, presets, to_yaml
from gan_dist.model.networks import layer_widths
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import expand_source
from tests.bench.ladder import words_of

BASE = {"data": {"shards": "/tmp/set"}}


def refusal(values: object, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(values, overrides)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_yaml_and_overrides_make_one_configuration(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {shards: set}\noptim: {g_lr: 2e-4, d_lr: 1e-3}\ntrain:\n")
    config = load_config(file, ["optim.d_lr=4E-5", "train.global_batch=12", "optim.betas=[0, 0.9]", "seed=7"])
    assert (config.optim.g_lr, config.optim.d_lr, config.train.global_batch, config.seed) == (2e-4, 4e-5, 12, 7)
    assert config.optim.betas == (0, 0.9)
    assert Path(config.data.shards).is_absolute()


def test_yaml_written_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(BASE, ["optim.g_lr=1e-7", "loss.generator_target=0.9"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.globalbatch=1", "unknown key train.globalbatch; did you mean train.global_batch?"),
        ("global_batch=1", "unknown key global_batch; did you mean train.global_batch?"),
        ("optim=3", "optim is a section; set one of its keys: g_lr, d_lr, "),
        ("train.global_batch=abc", "train.global_batch: expected integer, found 'abc'"),
        ("train.global_batch=0", "train.global_batch: expected greater than or equal to 1, found 0"),
        ("data.x_flip=1", "data.x_flip: expected boolean, found 1"),
        ("train.deterministic=1", "train.deterministic: expected boolean or 'auto', found 1"),
        ("model.resolution=48", "model.resolution: expected a power of two from 32 to 256, found 48"),
        ("model.max_channels=0", "model.max_channels: expected greater than or equal to 1, found 0"),
        ("loss.name=hing", "'wasserstein' or 'relativistic', found 'hing'"),
        ("model.d_norm=layer", "model.d_norm: expected 'batch', 'none' or 'spectral', found 'layer'"),
        (
            "data.placement=windowed",
            "data.window_shards: placement windowed needs a window of 1 shard or more, found 0",
        ),
        ("loss.gradient_penalty=3", "loss.gradient_penalty is a section; set one of its keys: weight, sigma, on,"),
        ("loss.gradient_penalty.wait=3", "key loss.gradient_penalty.wait; did you mean loss.gradient_penalty.weight?"),
        (
            "gradient_penalty.weight=3",
            "unknown key gradient_penalty.weight; did you mean loss.gradient_penalty.weight?",
        ),
        ("loss.gradient_penalty.weight.x=3", "; loss.gradient_penalty.weight is one key and set whole"),
        ("loss.gradient_penalty.weight=a", "loss.gradient_penalty.weight: expected number, found 'a'"),
        ("loss.gradient_penalty.share=0.7", "loss.gradient_penalty.share: expected 1, 0.5, 0.333, 0.25, ... (1 over"),
        (
            "loss.gradient_penalty.weight=1",
            "so it has no gradient penalty, found 1.0; set model.d_norm=none or spectral",
        ),
        ("optim.g_lr=.inf", "optim.g_lr: expected a finite number, found inf"),
        ("train.global_batch", "expected section.key=value, found 'train.global_batch'"),
        ("optim.betas=[0.5", "optim.betas: the value '[0.5' is not valid YAML"),
        ("optim.betas=0.5", "optim.betas: expected a list of numbers such as [0.5, 0.999], found 0.5"),
        ("foo.bar=3", "unknown key foo.bar; sections are data, model, loss, optim, train, log,"),
        ("evaluate.every_step=3", "unknown key evaluate.every_step; did you mean evaluate.every_steps?"),
        ("slurm.tim=3", "unknown key slurm.tim; sections are data, model"),
        ("train.epochs.x=3", "unknown key train.epochs.x; train.epochs is one key and set whole"),
        ("optim.betas=[0.5]", "optim.betas: expected a list of numbers such as [0.5, 0.999], found [0.5]"),
        ("data.shards=3", "data.shards: expected string, found 3; put it in quotes, in a shell in two kinds"),
        ("seed=010", "seed: expected integer, found '010'"),
        ("seed=!!int x", "seed: the value '!!int x' is not valid YAML"),
        ("seed=99999999999999999999", "seed: expected less than 9223372036854775808"),
        ("log.picture=3", "unknown key log.picture; log has scalars_every, samples_every, grid"),
    ],
)
def test_refusals_name_the_key_and_the_remedy(override: str, words: str) -> None:
    assert words in refusal(BASE, override)


def test_minimax_takes_no_generator_target() -> None:
    words = refusal(BASE, "loss.name=minimax", "loss.generator_target=0.9")
    assert words.startswith("loss.generator_target: minimax takes no generator target")


def test_unknown_key_in_a_file_names_the_file_and_the_nearest_key(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {shards: x}\noptim: {glr: 1}\n")
    assert refusal(file) == f"{file}: unknown key optim.glr; did you mean optim.g_lr?"


def test_a_file_is_not_blamed_for_what_was_said_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {shards: x}\ntrain: {epochs: 0}\n")
    assert refusal(file) == f"{file}: train.epochs: expected greater than 0, found 0"
    file.write_text("data: {shards: x}\n")
    assert refusal(file, "train.epochs=0") == "train.epochs: expected greater than 0, found 0"
    assert refusal(file, "loss.name=minimax", "loss.generator_target=0.9").startswith("loss.generator_target: minimax")
    assert refusal(file, "data.placement=windowed").startswith("data.window_shards: placement windowed")
    file.write_text("data: {shards: x}\ntrain: 3\n")
    assert refusal(file, "train.epochs=3").startswith(f"{file}: train is a section; expected its keys (device, epochs")


def test_on_is_a_key_like_others(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {shards: x}\nmodel: {d_norm: none}\nloss: {gradient_penalty: {weight: 1, on: both}}\n")
    assert load_config(file).loss.gradient_penalty.on == "both"
    file.write_text("data: {shards: x}\nYes: 3\n")
    assert refusal(file).startswith(f"{file}: unknown key Yes; ")
    file.write_text("data: {shards: x, x_flip: on}\n")
    assert load_config(file).data.x_flip is True


def test_numbers_are_numbers_and_all_else_is_text(tmp_path: Path) -> None:
    for word, seed in (("seed=12", 12), ("seed=1_000", 1000), ("seed=0x10", 16), ("seed=0", 0)):
        assert load_config(BASE, [word]).seed == seed
    for folder in ("2024-01-31", "2020-13-45", "24:00:00", "~nobody-of-that-name"):
        assert load_config(BASE, [f"data.shards={folder}"]).data.shards == str(Path.cwd() / folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n", "expected sections with keys"),
        ("data: {shards: x\n", "not valid YAML"),
        ("train: {}\n", "data.shards is missing; name a dataset"),
        ("dta: {shards: x}\n", "unknown key dta; did you mean data?"),
        ("data: {shards: x}\ntrain.epochs: 3\n", "unknown key train.epochs; write train: {epochs: ...}"),
        ("{{ shards }}: x\n", "run.yaml line 1: not valid YAML: a key is a word"),
        ("[" * 5000, "run.yaml: not valid YAML"),
        ("data: \0\n", "run.yaml: not valid YAML"),
        ("data: {shards: x}\nloss: {gradient_penalty: 3}\n", "loss.gradient_penalty is a section; expected its keys ("),
        (
            "data: {shards: x}\nloss: {gradient_penalty: []}\n",
            "loss.gradient_penalty is a section; expected its keys (",
        ),
        ("data: {shards: x}\nloss: {gradient_penalty: {x: 1}}\n", "unknown key loss.gradient_penalty.x; "),
        (
            "data: {shards: x}\nloss: {gradient_penalty.weight: 1}\n",
            "unknown key loss.gradient_penalty.weight; write loss: {gradient_penalty: {weight: ...}}",
        ),
        ("1: 2\n", "unknown key 1; sections are data,"),
        ("", "expected sections with keys, as in configs/paintings64.yaml, found nothing"),
        ("data: {}\n", "data.shards is missing; name a dataset"),
        ("data: {shards: x}\nseed: 1\nseed: 2\n", "'seed' stands twice"),
        ("data: {shards: x}\ntrain: 3\n", "train is a section; expected its keys (device, epochs,"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert words in refusal(file) and "\n" not in refusal(file)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    assert "no configuration at" in refusal(tmp_path / "none.yaml")
    assert "cannot read" in refusal(tmp_path)


def test_paths_expand_where_they_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/ana")
    monkeypatch.setenv("SCRATCH", "/scratch/ana")
    monkeypatch.chdir(tmp_path)
    assert expand_source("~/set") == "/home/ana/set"
    assert expand_source("$SCRATCH/set") == expand_source("${SCRATCH}/set") == "/scratch/ana/set"
    assert expand_source("set/../other") == str(tmp_path / "other")
    assert expand_source("https://host/a$b") == "https://host/a$b"
    with pytest.raises(UserError, match="UNSET_HERE is not set"):
        expand_source("$UNSET_HERE/set")


def test_every_key_is_documented() -> None:
    sections: list[tuple[str, object]] = [("", load_config(BASE))]
    while sections:
        path, section = sections.pop()
        for name, field in getattr(type(section), "model_fields", {}).items():
            sections.append((f"{path}.{name}", getattr(section, name)))
            assert path == "" or field.description, f"{path}.{name}"
    assert {"checkpoint.every_minutes", "loss.gradient_penalty", "loss.gradient_penalty.weight"} <= {
        *known_keys(Config)
    }


def test_a_section_may_lie_in_a_section() -> None:
    words = ["loss.gradient_penalty.weight=0.05", "loss.gradient_penalty.on=both"]
    for penalty in ({"sigma": 0.2}, None, {}):
        base = {**BASE, "model": {"d_norm": "none"}, "loss": {"gradient_penalty": penalty}}
        found = load_config(base, words).loss.gradient_penalty
        assert (found.weight, found.on, found.sigma) == (0.05, "both", 0.2 if penalty else 0.1)
        assert base["loss"] == {"gradient_penalty": penalty}  # what was given stays as it was


def test_the_thesis_keeps_no_averaged_generator() -> None:
    assert preset("paintings64").train.ema_half_life_images == 0


def test_every_preset_is_there_and_gives_every_value_its_source() -> None:
    home = Path(__file__).parent.parent.parent / "configs"
    assert sorted(PRESETS) == sorted(presets()) == sorted(file.stem for file in home.glob("*.yaml"))
    for name in PRESETS:
        if name.startswith("paintings"):
            values = [
                line for line in (home / f"{name}.yaml").read_text().splitlines() if re.match(r"\s*\w+: ?\S", line)
            ]
            assert len(values) > 30 and [line for line in values if "#" not in line] == [], name
            assert preset(name).model.resolution == int(name.removeprefix("paintings").removesuffix("-modern"))


def test_the_penalty_of_larger_presets_grows_with_the_image_and_they_keep_their_widths() -> None:
    small, large = preset("paintings128"), preset("paintings256")
    for one in (small, large):
        rule = 0.0001 * one.model.resolution**2 / one.train.global_batch
        assert one.loss.gradient_penalty.weight == pytest.approx(rule)
        assert one.optim.decay_images == one.train.epochs * 103_250
    widths = [
        layer_widths(one.model.resolution, one.model.g_channels, one.model.max_channels) for one in (small, large)
    ]
    assert widths[0] == widths[1][:-1] == [512, 512, 256, 128, 64]
    thesis = preset("paintings64").model
    assert thesis.max_channels is None and layer_widths(64, thesis.g_channels) == [512, 256, 128, 64]


def test_the_modern_preset_sees_as_many_images_with_the_same_networks_as_the_thesis() -> None:
    modern, thesis = preset("paintings64-modern"), preset("paintings64")
    assert modern.train.epochs == thesis.train.epochs and modern.optim.decay_images == 30 * 103_250
    for key in ("resolution", "latent_dim", "g_channels", "d_channels", "blocks", "max_channels", "minibatch_std"):
        assert getattr(modern.model, key) == getattr(thesis.model, key)
    for key in ("scalars_every", "samples_every"):
        assert getattr(modern.log, key) * modern.train.global_batch == getattr(thesis.log, key) * 128


def test_the_modern_preset_is_the_recipe_that_was_measured() -> None:
    root = Path(__file__).parent.parent.parent
    recipes = yaml.safe_load((root / "tests/bench/recipes.yaml").read_text()) | {"common": []}
    measured = load_config(root / "configs/paintings64.yaml", words_of(recipes, "pairs64-augment"))
    modern = preset("paintings64-modern")
    assert modern.model == measured.model and modern.loss == measured.loss and modern.data == measured.data
    assert modern.optim.model_copy(update={"decay_images": 400_000}) == measured.optim
    assert modern.train == measured.train


def test_changes_and_their_rules() -> None:
    old = load_config(BASE).to_dict()
    new = load_config(BASE, ["train.epochs=40", "log.grid=16", "optim.d_steps=2", "train.threads=1"]).to_dict()
    found = changes(old, new)
    assert found == {
        "log.grid": (64, 16),
        "optim.d_steps": (1, 2),
        "train.epochs": (30.0, 40.0),
        "train.threads": (None, 1),
    }
    assert [change_rule(key) for key in found] == ["free", "never", "upward", "noted"]

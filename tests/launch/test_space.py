"""Spaces: what a key may be searched over, said in one line before anything starts; and what is drawn from one."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest
import yaml

from gan_dist.config.schema import Config, load_config
from gan_dist.utils.errors import UserError
from launch.cli import sweep
from launch.space import Space, read_space
from launch.sweep import ask

BASE = {"data": {"shards": "/set"}, "evaluate": {"every_steps": 10}}


def space(tmp_path: Path, text: str, *words: str, ranks: int = 1) -> Space:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    return read_space(file, load_config(BASE, words), words, ranks)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim.lr: {log: [1e-5, 1e-3]}", "unknown key optim.lr; did you mean optim.g_lr?"),
        ("optm: {g_lr: {log: [1e-5, 1e-3]}}", "unknown key optm.g_lr; did you mean optim.g_lr?"),
        ("optim: {choice: [1, 2]}", "unknown key optim.choice; optim has g_lr, d_lr"),
        ("optim.g_lr: {float: [-0.1, 0.1]}", "optim.g_lr: expected greater than 0, found -0.1"),
        ("optim.decay_to: {float: [0.0, 1.0]}", "optim.decay_to: expected less than 1, found 1.0"),
        ("loss.real_target: {float: [0.5, 1.5]}", "loss.real_target: expected less than or equal to 1, found 1.5"),
        ("loss.real_target: {float: [0.5, 1.001, 0.001]}", "loss.real_target: expected less than or equal to 1, found"),
        ("model.g_channels: {int: [0, 8]}", "model.g_channels: expected greater than or equal to 1, found 0"),
        ("model.g_channels: {float: [8, 64]}", "model.g_channels: expected integer, found 36.00000000000001"),
        ("model.g_channels: {log: [8.5, 64]}", "model.g_channels: expected integer, found 8.5"),
        ("data.x_flip: {int: [0, 1]}", "data.x_flip: expected boolean, found 0"),
        ("loss.name: {choice: [hinge, hing]}", "loss.name: expected 'minimax', 'non_saturating', 'least_squares'"),
        ("loss.name: {choice: [hinge, 3]}", "loss.name: expected 'minimax'"),
        ("loss.gradient_penalty.share: {float: [0.25, 1.0]}", "loss.gradient_penalty.share: expected 1, 0.5"),
        ("optim.decay: {choice: [none, linear]}", "optim.decay_images: expected 1 or more with optim.decay=linear"),
        ("optim.g_lr: {log: [0, 1]}", "optim.g_lr: expected log: [low, high] above 0, found [0, 1]"),
        ("optim.g_lr: {log: [1e-3, 1e-5]}", "optim.g_lr: expected low < high"),
        ("optim.g_lr: {log: [1e-5, 1e-3, 2]}", "optim.g_lr: expected log: [low, high], found"),
        ("optim.g_lr: {float: [1e-5, .inf]}", "optim.g_lr: expected float: [low, high], and a step"),
        ("optim.g_lr: {float: [1e-5, true]}", "optim.g_lr: expected float: [low, high], and a step"),
        ("optim.g_lr: {uniform: [1e-5, 1]}", "optim.g_lr: expected float, log or int: [low, high], or choice"),
        ("optim.g_lr: [1e-5, 1e-3]", "optim.g_lr: expected float, log or int: [low, high], or choice"),
        ("optim.g_lr: {log: [1e-5, 1e-3], float: [0, 1]}", "optim.g_lr: expected float, log or int: [low, high]"),
        ("optim.g_lr: {choice: []}", "optim.g_lr: expected choices, each once, found []"),
        ("optim.g_lr: {choice: [0.1, 0.1]}", "optim.g_lr: expected choices, each once"),
        ("train.global_batch: {int: [8, 64, 100]}", "train.global_batch: expected low < high, and a step that fits"),
        ("train.global_batch: {int: [1.5, 64]}", "train.global_batch: expected int: whole numbers"),
        ("evaluate.samples: {int: [10, 20]}", "evaluate.samples: trials are compared by what it decides"),
        ("data.shards: {choice: [/a, /b]}", "data.shards: trials are compared by what it decides"),
        ("optim.g_lr: {log: [1e-5, 1]}\noptim: {g_lr: {log: [1e-4, 1]}}", "optim.g_lr: expected once, found twice"),
        ("{}", "expected one key or more to search, found none"),
        ("- optim.g_lr", "expected sections with keys"),
    ],
)
def test_what_cannot_be_searched_is_one_line_that_names_the_file(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        space(tmp_path, text)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'space.yaml'}: ") and line in said and "\n" not in said, said


def test_values_that_do_not_go_together_are_found_before_anything_starts(tmp_path: Path) -> None:
    text = "loss.name: {choice: [non_saturating, hinge]}\nloss.real_target: {float: [0.8, 1.0]}"
    with pytest.raises(UserError, match=r"some values do not go together: loss.real_target: hinge takes no.*tried"):
        space(tmp_path, text)


def test_what_the_configuration_must_have(tmp_path: Path) -> None:
    text = "optim.g_lr: {log: [1e-5, 1e-3]}"
    with pytest.raises(UserError, match=r"optim.g_lr is searched, and set to 0.001 on the command line"):
        space(tmp_path, text, "optim.g_lr=1e-3")
    with pytest.raises(UserError, match=r"^evaluate.every_steps: trials are compared by evaluate/swd, expected 1"):
        space(tmp_path, text, "evaluate.every_steps=0")
    with pytest.raises(UserError, match=r"8 ranks, but train.global_batch is 4"):
        space(tmp_path, "train.global_batch: {int: [4, 64, 4]}", ranks=8)


def test_values_that_do_not_fit_the_dataset_are_found_before_anything_starts(tmp_path: Path) -> None:
    def fits(settings: Config) -> None:
        if settings.model.classes_min_images > 60:
            raise UserError("the largest class has 60 images")

    file = tmp_path / "space.yaml"
    file.write_text("model.classes_min_images: {int: [10, 500]}")
    with pytest.raises(UserError, match=r"space.yaml: the largest class has 60 images \(tried model.classes_min"):
        read_space(file, load_config(BASE), fits=fits)
    file.write_text("model.classes_min_images: {int: [10, 60]}")
    read_space(file, load_config(BASE), fits=fits)


def test_the_command_says_it_with_status_2_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, file = tmp_path / "art.yaml", tmp_path / "space.yaml"
    config.write_text(yaml.safe_dump(BASE))
    file.write_text("optim.lr: {log: [1e-5, 1e-3]}")
    monkeypatch.setenv("GAN_DIST_RUNS", str(tmp_path / "runs"))
    with pytest.raises(UserError, match=r"space.yaml: unknown key optim.lr; did you mean") as caught:
        sweep(str(config), str(file))
    assert caught.value.exit_status == 2 and not (tmp_path / "runs").exists()
    file.write_text("optim.g_lr: {log: [1e-5, 1e-3]}")
    with pytest.raises(UserError, match="/set"):  # no dataset there
        sweep(str(config), str(file))
    assert not (tmp_path / "runs").exists()


MANY = """
optim: {g_lr: {log: [1e-5, 1e-3]}, betas: {choice: [[0.0, 0.9], [0.5, 0.999]]}}
loss.real_target: {float: [0.8, 1.0, 0.05]}
train.global_batch: {int: [8, 65, 8]}
model.g_channels: {log: [4, 64]}
data.x_flip: {choice: [true, false]}
optim.beta2_to: {choice: [null]}
"""


def test_every_draw_is_a_configuration_of_the_keys_types(tmp_path: Path) -> None:
    made = space(tmp_path, MANY)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    drawn = [made.settings(study.ask()) for _ in range(40)]
    configs = [made.config(settings) for settings in drawn]
    assert all(1e-5 <= config.optim.g_lr <= 1e-3 for config in configs)
    assert sum(config.optim.g_lr < 1e-4 for config in configs) > 10  # as many in each power of ten
    assert {config.optim.betas for config in configs} == {(0.0, 0.9), (0.5, 0.999)}
    assert {round(config.loss.real_target, 2) for config in configs} == {0.8, 0.85, 0.9, 0.95, 1.0}
    assert {config.train.global_batch for config in configs} <= set(range(8, 65, 8))
    assert sum(config.model.g_channels < 16 for config in configs) > 10
    # However large a batch is, trials are evaluated at the same numbers of images.
    assert {round(1280 / (c.train.global_batch * c.evaluate.every_steps), 1) for c in configs} <= {0.9, 1.0, 1.1}
    assert yaml.safe_load(yaml.safe_dump(made.to_dict()))["optim.betas"] == {"choice": [[0.0, 0.9], [0.5, 0.999]]}


def test_tpe_beats_random_search_on_a_known_function(tmp_path: Path) -> None:
    """Best of 30, over three seeds: a bowl over two rates and a width, of which one in a thousand is any good."""
    text = "optim.g_lr: {log: [1e-6, 1]}\noptim.d_lr: {log: [1e-6, 1]}\nmodel.g_channels: {log: [4, 512]}"
    made = space(tmp_path, text)

    def bowl(settings: dict[str, float]) -> float:
        g, d = math.log10(settings["optim.g_lr"]) + 4, math.log10(settings["optim.d_lr"]) + 3
        return g * g + d * d + (math.log2(settings["model.g_channels"]) - 6) ** 2

    def best(seed: int, tpe: bool) -> float:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        for _ in range(30):
            trial = ask(study, made, seed) if tpe else study.ask()
            study.tell(trial, bowl(made.settings(trial)))
        return float(study.best_value)

    tpe, random = ([best(seed, kind) for seed in range(3)] for kind in (True, False))
    assert sum(tpe) < 0.5 * sum(random), (tpe, random)
    assert sum(one < other for one, other in zip(tpe, random, strict=True)) >= 2
    assert best(0, True) == tpe[0], "the same seed, another search"

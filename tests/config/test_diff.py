from __future__ import annotations

from typing import Any

from gan_dist.config.diff import continuation
from gan_dist.config.schema import load_config


def config(**sections: Any) -> dict[str, Any]:
    return load_config({"data": {"shards": "/tmp/none"}, **sections}).to_dict()


def test_a_run_from_before_a_key_was_there_had_its_default() -> None:
    stored = config()
    for section, key in (("model", "upsample"), ("model", "d_norm"), ("loss", "name")):
        del stored[section][key]
    assert continuation(stored, config()) == ([], [])
    refused, _ = continuation(stored, config(model={"upsample": "nearest"}, loss={"name": "hinge"}))
    assert refused == [
        "loss.name was non_saturating, now hinge",
        "model.upsample was transposed, now nearest",
    ]


def test_what_may_change_is_announced_and_the_rest_refused() -> None:
    rules: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
        "free": ({"log": {"grid": 9}}, [], []),
        "upward": ({"train": {"epochs": 31}}, [], []),
        "downward": ({"train": {"epochs": 29}}, ["train.epochs was 30.0, now 29.0"], []),
        "noted": (
            {"train": {"threads": 3}},
            [],
            ["train.threads was None, now 3: the same game, though not the same bits"],
        ),
        "never": ({"seed": 4}, ["seed was 0, now 4"], []),
    }
    for name, (changed, refused, notes) in rules.items():
        assert continuation(config(), config(**changed)) == (refused, notes), name

"""What differs between two configurations, and which keys may differ when a run continues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from gan_dist.config.schema import Config, DataConfig

Rule = Literal["free", "noted", "upward", "never"]

CHANGE_RULES: dict[str, Rule] = {
    "data.shards": "free",  # the dataset itself is held by its manifest's hash
    "data.placement": "free",
    "data.cache_dir": "free",
    "train.epochs": "upward",
    "train.stop_after_minutes": "free",
    "train.device": "noted",
    "train.precision": "noted",
    "train.runner": "noted",
    "train.batchnorm_kernels": "free",  # what it comes to is held beside environment.json's, and said
    "train.threads": "noted",
    "train.deterministic": "noted",
    "log.": "free",
    "checkpoint.": "free",
    "evaluate.": "free",
    "dist.": "free",
}
"""What may differ when a run continues. `noted` changes bits though not the game, so the start says so; keys (or whole
sections) that are not listed would make another run and are refused. The number of ranks is not a key: it is free."""


def with_defaults(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration, flat, with the default of each key that was not there yet when it was stored."""
    return {**flatten(Config(data=DataConfig(shards="")).to_dict()), **flatten(stored)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested sections as one {"section.key": value}."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def changes(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (stored, wanted)} for every key that differs between two configurations as plain values."""
    old, new = flatten(stored), flatten(wanted)
    return {key: (old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)}


def change_rule(key: str) -> Rule:
    """Returns how `key` may move when a run continues: free, noted, upward, or never."""
    section = key.split(".")[0] + "."
    return CHANGE_RULES.get(key, CHANGE_RULES.get(section, "never"))


def continuation(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Returns (changes that a continued run must not make, changes to announce), a line each, with both values.

    The run stored with the configuration `stored` may continue with `wanted` when the first list is empty.
    """
    refused, notes = [], []
    for key, (old, new) in changes(with_defaults(stored), wanted).items():
        rule = change_rule(key)
        if rule == "never" or (rule == "upward" and old is not None and new < old):
            refused.append(f"{key} was {old}, now {new}")
        elif rule == "noted":
            notes.append(f"{key} was {old}, now {new}: the same game, though not the same bits")
    return refused, notes

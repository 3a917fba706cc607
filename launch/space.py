"""SPACE.yaml: the keys that a sweep searches, and where. Held against the configuration's own types and ranges.

optim.g_lr: {log: [1e-5, 1e-3]}                 # a number, as likely between 1e-5 and 1e-4 as between 1e-4 and 1e-3
loss.real_target: {float: [0.8, 1.0]}
train.global_batch: {int: [32, 256, 32]}        # from, to, and a step if there is one
model.g_channels: {log: [16, 128]}              # whole numbers, for a key that takes no others
optim.betas: {choice: [[0.0, 0.9], [0.5, 0.999]]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from gan_dist.config.base import known_keys, parse_overrides, read_yaml, with_overrides
from gan_dist.config.schema import Config, load_config
from gan_dist.data.order import check_ranks
from gan_dist.runs.study import load_optuna, settings_of
from gan_dist.utils.errors import UserError

KINDS = ("float", "log", "int", "choice")
FORMS = "float, log or int: [low, high], or choice: [a, b, ...]"
YARDSTICKS = ("evaluate", "data.shards", "data.cache_dir", "model.resolution")
"""Keys, and a section, that decide what trials are measured by: the same for all."""
DRAWS = 32
"""Combinations that are tried before anything starts."""
MOST_WHOLE = 64
"""Whole numbers of a range that are tried, each of them; of a longer one so many."""


@dataclass(frozen=True)
class Dimension:
    """One key, and the values that it may have."""

    key: str
    kind: str
    values: tuple[Any, ...]
    """(low, high) or (low, high, step); of a choice, all there are."""
    whole: bool = False
    """Whether only whole numbers are meant: `int`, or `log` of a key that takes no others."""

    @property
    def log(self) -> bool:
        return self.kind == "log"

    @property
    def domain(self) -> tuple[float, float] | list[Any]:
        """(low, high), or the choices."""
        return list(self.values) if self.kind == "choice" else (self.values[0], self.values[1])

    def suggest(self, trial: Any) -> Any:
        """Has a trial of Optuna's choose a value for this key, if it has none yet."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.key, [json.dumps(value) for value in self.values])
        low, high, *step = self.values
        suggest = trial.suggest_int if self.whole else trial.suggest_float
        return suggest(self.key, low, high, **({"log": True} if self.log else {"step": step[0]} if step else {}))

    def probes(self) -> list[Any]:
        """Returns values that the configuration must take if it takes all: ends, all choices, what lies between."""
        if self.kind == "choice":
            return list(self.values)
        low, high, *step = self.values
        if self.whole:
            every = max(step[0] if step else 1, (high - low) // MOST_WHOLE)
            return [low, high, *range(low, high, every)]
        if step:
            return [low, low + step[0], high]
        middle = math.sqrt(low * high) if self.log else (low + high) / 2
        return [low, high, math.nextafter(middle, high)]


@dataclass(frozen=True)
class Space:
    """What a sweep searches around a configuration."""

    base: Config
    dimensions: tuple[Dimension, ...]

    def __iter__(self) -> Any:
        return iter(self.dimensions)

    def settings(self, trial: Any) -> dict[str, Any]:
        """Returns {"section.key": value}, chosen by a trial of Optuna's."""
        for dimension in self.dimensions:
            dimension.suggest(trial)
        return settings_of(trial.params)

    def config(self, settings: Mapping[str, Any]) -> Config:
        """Returns the configuration of a trial. Raises UserError where the settings do not go together.

        It is evaluated as often as the others: at the same numbers of images, whatever its batch.
        """
        made = load_config(self.base, [word(key, value) for key, value in settings.items()])
        every = round(self.base.evaluate.every_steps * _images_per_step(self.base) / _images_per_step(made))
        return load_config(made, [f"evaluate.every_steps={max(1, every)}"])

    def to_dict(self) -> dict[str, Any]:
        """Returns the space as SPACE.yaml has it."""
        return {each.key: {each.kind: list(each.values)} for each in self.dimensions}


def _images_per_step(config: Config) -> int:
    return config.train.global_batch * config.optim.d_steps


def word(key: str, value: Any) -> str:
    """Returns the word that sets a key on a command line."""
    return f"{key}={json.dumps(value)}"


def read_space(
    file: str | Path,
    base: Config,
    fixed: Sequence[str] = (),
    ranks: int = 1,
    fits: Callable[[Config], None] = lambda settings: None,
) -> Space:
    """Returns the space of a file around a configuration, in which the words `fixed` have set keys already. `fits`
    raises UserError for a configuration that does not fit the dataset.

    Raises UserError with one line: for an unknown key, a range that the key does not have, a wrong type, a key that is
    fixed or that trials are measured by, and for values that do not go together.
    """
    path = Path(file)
    given = _flat(read_yaml(path.expanduser(), "docs/sweep.md"), path)
    if not given:
        raise UserError(f"{path}: expected one key or more to search, found none")
    if base.evaluate.every_steps == 0:
        raise UserError(
            "evaluate.every_steps: trials are compared by evaluate/swd, expected 1 or more, found 0; add "
            "evaluate.every_steps=N to the command, a tenth of a run or so"
        )
    dimensions = [_dimension(path, key, value) for key, value in given.items()]
    if not any(each.key.startswith("model.classes") for each in dimensions):
        fits(base)
    set_already = parse_overrides(fixed)
    for number, each in enumerate(dimensions):
        if each.key in set_already:
            raise UserError(f"{path}: {each.key} is searched, and set to {set_already[each.key]} on the command line")
        dimensions[number] = _checked(path, base, each, ranks, fits)
    space = Space(base, tuple(dimensions))
    for settings in _drawn(space):
        try:
            made = space.config(settings)
            check_ranks(ranks, made.train.global_batch)
            fits(made)
        except UserError as error:
            words = " ".join(word(key, value) for key, value in settings.items())
            raise UserError(f"{path}: some values do not go together: {error} (tried {words})") from None
    return space


def _flat(values: Mapping[str, Any], path: Path, prefix: str = "") -> dict[str, Any]:
    """Returns {"section.key": {kind: values}} of sections, or of dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        known = known_keys(Config)
        section = any(each.startswith(f"{key}.") for each in known)
        unknown = (
            key not in known and isinstance(value, dict) and all(isinstance(each, dict) for each in value.values())
        )
        if isinstance(value, dict) and value and (section or unknown):
            inner = _flat(value, path, f"{key}.")
        else:
            inner = {key: value}
        if twice := flat.keys() & inner:
            raise UserError(f"{path}: {min(twice)}: expected once, found twice (in a section and with dots)")
        flat |= inner
    return flat


def _dimension(path: Path, key: str, value: Any) -> Dimension:
    """Returns the dimension that SPACE.yaml gives a key; knows nothing of the key itself."""
    if any(key == each or key.startswith(f"{each}.") for each in YARDSTICKS):
        raise UserError(f"{path}: {key}: trials are compared by what it decides; expected one value for all of them")
    try:
        with_overrides(Config, {}, [f"{key}=null"])  # is there such a key?
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    values = next(iter(value.values())) if isinstance(value, dict) and len(value) == 1 else None
    kind = next(iter(value)) if isinstance(values, list) else None
    if not isinstance(values, list) or kind not in KINDS:
        raise UserError(f"{path}: {key}: expected {FORMS}, found {value!r}")
    if kind == "choice":
        texts = [json.dumps(each, default=str) for each in values]
        if not values or len(set(texts)) < len(texts):
            raise UserError(f"{path}: {key}: expected choices, each once, found {values!r}")
        return Dimension(key, kind, tuple(values))
    numbers = [each for each in values if isinstance(each, int | float) and not isinstance(each, bool)]
    steps = 2 if kind == "log" else 3
    if len(numbers) < len(values) or not 2 <= len(values) <= steps or not all(map(math.isfinite, numbers)):
        more = "" if kind == "log" else ", and a step if there is one"
        raise UserError(f"{path}: {key}: expected {kind}: [low, high]{more}, found {values!r}")
    low, high, *step = numbers
    if not low < high or (step and not 0 < step[0] <= high - low):
        raise UserError(f"{path}: {key}: expected low < high, and a step that fits between them, found {values!r}")
    if kind == "log" and low <= 0:
        raise UserError(f"{path}: {key}: expected log: [low, high] above 0, found {values!r}")
    if kind == "int" and not all(isinstance(each, int) for each in numbers):
        raise UserError(f"{path}: {key}: expected int: whole numbers, found {values!r}")
    if step:  # Optuna would round a range of broken steps itself, and say so
        size = Decimal(str(step[0]))
        high = type(low)(Decimal(str(low)) + (Decimal(str(high)) - Decimal(str(low))) // size * size)
    return Dimension(key, kind, (low, high, *step), whole=kind == "int")


def _checked(path: Path, base: Config, each: Dimension, ranks: int, fits: Callable[[Config], None]) -> Dimension:
    """Returns the dimension once the configuration takes its probes. Raises UserError with what it says of one."""
    wholes = replace(each, whole=True)
    could_be_whole = each.log and not each.whole and all(isinstance(end, int) for end in each.values)
    for value in each.probes():
        try:
            made = load_config(base, [word(each.key, value)])
            check_ranks(ranks, made.train.global_batch)
            fits(made)
        except UserError as error:
            if could_be_whole:
                return _checked(path, base, wholes, ranks, fits)
            tried = "" if each.key in str(error) else f" (tried {word(each.key, value)})"
            raise UserError(f"{path}: {error}{tried}") from None
    return each


def _drawn(space: Space) -> list[dict[str, Any]]:
    """Returns random settings, the same ones every time."""
    optuna = load_optuna()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.settings(study.ask()) for _ in range(DRAWS)]

"""Settings of any kind: YAML and `section.key=value` words into validated sections; a slip is one line that says what
to write instead."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gan_dist.errors import UserError

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A group of keys: unknown ones are refused, types are not guessed, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


_Model = TypeVar("_Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML with `2e-4` as a number, as people write it (YAML 1.1 wants `2.0e-4`), and each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def expand_path(text: str, base: Path | None = None) -> str:
    """Returns `text` as an absolute path with `~` and `$VAR` expanded; addresses (http:, s3:, pipe:, ...) pass.

    Relative paths are taken from `base` (the working directory by default). Raises UserError for an unset variable.
    """
    if re.match(r"^(?:[a-z][a-z0-9+.-]*://|pipe:)", text):
        return text
    expanded = os.path.expandvars(Path(text).expanduser())
    if missing := re.search(r"\$\{?(\w+)", expanded):
        raise UserError(f"{text}: the environment variable {missing[1]} is not set; set it or write the path out")
    return os.path.abspath((base or Path.cwd()) / expanded)  # noqa: PTH100 (resolve() would follow links)


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Returns {"section.key": value} from `section.key=value` words, values read as YAML.

    Raises UserError for a word of another form.
    """
    parsed = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise UserError(f"expected section.key=value, found {word!r} (for example train.global_batch=256)")
        try:
            parsed[key] = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            raise UserError(f"{key}: the value {text!r} is not valid YAML") from None
    return parsed


def read_yaml(path: Path, example: str = "configs/paintings64.yaml") -> dict[str, Any]:
    """Returns a YAML file's mapping, read as configurations are. Raises UserError with one line; `example` is named."""
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"no configuration at {path}; expected a YAML file such as {example}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected sections with keys (data:, model:, ...), found {type(loaded).__name__}")
    return loaded


def known_keys(model: type[BaseModel]) -> list[str]:
    """Returns every key of a model of sections as `section.key`, and the section names themselves."""
    keys: list[str] = []
    for name in model.model_fields:
        keys += [name, *(f"{name}.{key}" for key in _keys_of(model, name))]
    return keys


def with_overrides(model: type[BaseModel], values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns `values` with `section.key=value` words applied; a section that is null becomes an empty one.

    Raises UserError for a word of another form, and for a key that `model` does not have.
    """
    found = dict(values)
    for key, value in parse_overrides(overrides).items():
        head, _, tail = key.partition(".")
        if key not in known_keys(model):
            raise UserError(f"unknown key {key}{_nearest(model, key)}")
        if not tail and (keys := _keys_of(model, head)):
            raise UserError(f"{key} is a section; set one of its keys: {', '.join(keys)}")
        if tail:
            section = found.get(head)
            found[head] = {**section, tail: value} if isinstance(section, dict) else {tail: value}
        else:
            found[head] = value
    return {key: {} if value is None and _keys_of(model, key) else value for key, value in found.items()}


def validate(model: type[_Model], values: Mapping[str, Any], origin: str, overrides: Sequence[str] = ()) -> _Model:
    """Returns the model. Raises UserError with one line that names the key, expected and found, and the `origin` of
    `values`, unless the fault was said in `overrides`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        key, words = _explain(model, error)
        blame = "" if key in parse_overrides(overrides) else f"{origin}: "
        raise UserError(blame + words) from None


def _explain(model: type[BaseModel], error: ValidationError) -> tuple[str, str]:
    """Returns the key of a validation's first fault, and what is wrong with it."""
    fault = error.errors()[0]
    inner = ("str", "int", "bool")  # what a union tried
    parts = [str(part) for part in fault["loc"] if part not in inner and not str(part).startswith("function-")]
    key, place = ".".join(parts[:2]), ".".join(parts)
    if fault["type"] == "extra_forbidden":
        return key, f"unknown key {place}{_nearest(model, place)}"
    if fault["type"] == "missing":
        return key, f"{place} is missing" + ("; name a dataset" if place == "data.shards" else "")
    if fault["type"] == "value_error":
        words = fault["msg"].removeprefix("Value error, ")
        return words.partition(":")[0], words
    expected = fault["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    if fault["type"] == "tuple_type":
        expected = "a list of numbers such as [0.5, 0.999]"
    return key, f"{place}: expected {expected}, found {fault.get('input')!r}"


def _keys_of(model: type[BaseModel], section: str) -> list[str]:
    """Returns the keys of a section; none for a key that stands alone, or an unknown one."""
    annotation = model.model_fields[section].annotation if section in model.model_fields else None
    return list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _nearest(model: type[BaseModel], key: str) -> str:
    """Returns a hint that names the valid key whose last word is, or is most like, that of `key`."""
    section, _, last = key.rpartition(".")
    tails = {name.rsplit(".", 1)[-1]: name for name in reversed(known_keys(model))}
    if close := difflib.get_close_matches(last, tails, n=1):
        return f"; did you mean {tails[close[0]]}?"
    if keys := _keys_of(model, section):
        return f"; {section} has {', '.join(keys)}"
    return f"; sections are {', '.join(name for name in model.model_fields if _keys_of(model, name))}"

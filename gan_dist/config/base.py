"""Settings of any kind: YAML and `section.key=value` words into validated sections; a slip is one line that says what
to write instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gan_dist.utils.errors import UserError

Positive = Annotated[int, Field(ge=1, lt=2**31)]
MOST = 2**63 - 1
"""The largest whole number, and seed, that torch takes."""
NonNegative = Annotated[int, Field(ge=0, lt=MOST + 1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A group of keys: unknown ones are refused, types are not guessed, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


_Model = TypeVar("_Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML as people write it, and each key once.

    YAML 1.1 would take `2e-4` for text, `24:00:00` for 86,400, `010` for 8, the key `on` for true, and fail on a folder
    called 2020-13-45.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is a word", key_node.start_mark)
            if key_node.tag == "tag:yaml.org,2002:bool":
                key_node.tag = "tag:yaml.org,2002:str"
            key = self.construct_object(key_node, deep=deep)
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


_REPLACED = {f"tag:yaml.org,2002:{name}" for name in ("float", "int", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _load(text: str) -> Any:
    """Returns the value of YAML text. Raises YAMLError whatever is wrong with it."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, TypeError, RecursionError) as error:  # `!!int x`, `!!map 3`, ten thousand brackets
        raise yaml.YAMLError(str(error)) from None


def check_seed(seed: int) -> None:
    """Raises UserError unless the `seed` of a command is what a configuration's may be."""
    if not 0 <= seed <= MOST:
        raise UserError(f"--seed: expected a whole number from 0 to {MOST}, found {seed}")


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
            parsed[key] = _load(text)
        except yaml.YAMLError:
            raise UserError(f"{key}: the value {text!r} is not valid YAML") from None
    return parsed


def read_yaml(path: Path, example: str = "configs/paintings64.yaml") -> dict[str, Any]:
    """Returns a YAML file's mapping, read as configurations are. Raises UserError with one line; `example` is named."""
    try:
        loaded = _load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no configuration at {path}; expected a YAML file such as {example}") from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {why}; expected a YAML file such as {example}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        why = " ".join(str(getattr(error, "problem", error)).split())
        raise UserError(f"{path}{where}: not valid YAML: {why}") from None
    if not isinstance(loaded, dict):
        found = "nothing" if loaded is None else f"a {type(loaded).__name__}"
        raise UserError(f"{path}: expected sections with keys, as in {example}, found {found}")
    return loaded


def known_keys(model: type[BaseModel]) -> list[str]:
    """Returns every key of a model of sections as `section.key`, and the section names themselves."""
    keys: list[str] = []
    for name in model.model_fields:
        section = _section(model, name)
        keys += [name, *(f"{name}.{key}" for key in (known_keys(section) if section else ()))]
    return keys


def with_overrides(model: type[BaseModel], values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns `values` with `section.key=value` words applied; a section that is null or not there is an empty one.

    Raises UserError for a word of another form, and for a key that `model` does not have.
    """
    merged = _with_all_sections(model, values)
    for key, value in parse_overrides(overrides).items():
        if key not in known_keys(model):
            raise UserError(f"unknown key {key}{_nearest(model, key)}")
        if keys := _keys_of(model, key):
            raise UserError(f"{key} is a section; set one of its keys: {', '.join(keys)}")
        *path, last = key.split(".")
        section: Any = merged
        for name in path:
            section = section[name] if isinstance(section, dict) else None
        if isinstance(section, dict):  # what a file has instead is refused later
            section[last] = value
    return merged


def _with_all_sections(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns copies of `values` and of the sections in it, an empty one where it has none."""
    merged = dict(values)
    for name in model.model_fields:
        inner = {} if merged.get(name) is None else merged[name]
        if (section := _section(model, name)) and isinstance(inner, Mapping):
            merged[name] = _with_all_sections(section, inner)
    return merged


def validate(model: type[_Model], values: Mapping[str, Any], origin: str, overrides: Sequence[str] = ()) -> _Model:
    """Returns the model. Raises UserError with one line that names the key, expected and found, and the `origin` of
    `values`, unless the fault stands in `overrides`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        key, words = _explain(model, error)
        in_overrides = any(f"{word}.".startswith(f"{key}.") for word in parse_overrides(overrides))
        raise UserError(words if in_overrides else f"{origin}: {words}") from None


_LIST = "{key}: expected a list of numbers such as [0.5, 0.999], found {found!r}"
_SENTENCES = {
    "extra_forbidden": "unknown key {place}{nearest}",
    "invalid_key": "unknown key {place}{nearest}",
    "not_a_section": "{place} is a section; expected its keys ({keys}), found {found!r}",
    "tuple_type": _LIST,
    "too_long": _LIST,
    "missing": "{place} is missing",
    "missing_dataset": "{place} is missing; name a dataset",
    "value_error": "{message}",
    "number_for_text": "{place}: expected {message}, found {found!r}; "
    "put it in quotes, in a shell in two kinds: '\"...\"'",
}
"""The sentence for each kind of fault: pydantic's kinds, and some of our own where theirs say too little."""
_ANY_OTHER = "{place}: expected {message}, found {found!r}"


def _explain(model: type[BaseModel], error: ValidationError) -> tuple[str, str]:
    """Returns what a validation's first fault is about (a key, or a section whose keys disagree) and the sentence."""
    fault = min(error.errors(), key=lambda each: each["type"] == "missing")  # a key may be missing because misspelt
    kind, found, message = fault["type"], fault.get("input"), fault["msg"]
    for other in error.errors():  # a union's words, beside its type
        if other["type"] == "literal_error" != kind and other["loc"][:-1] == fault["loc"][:-1]:
            message += f" or {other['msg'].removeprefix('Input should be ')}"
    for prefix in ("Value error, ", "Input should be ", "a valid "):
        message = message.removeprefix(prefix)
    tried = ("str", "int", "bool", "[key]")  # by a union, beyond section and key
    parts = [str(part) for number, part in enumerate(fault["loc"]) if number < 2 or part not in tried]
    key, place, keys = ".".join(parts[:2]), ".".join(parts), ", ".join(_keys_of(model, ".".join(parts)))
    if keys and kind not in ("value_error", "extra_forbidden", "invalid_key"):
        kind, key = "not_a_section", key if len(parts) > 1 else ""
    elif kind == "missing" and place == "data.shards":
        kind = "missing_dataset"
    elif kind == "missing" and len(parts) > 2:  # an element of a list
        kind = "too_long"
    elif kind == "string_type" and isinstance(found, int | float):
        kind = "number_for_text"
    elif kind == "value_error":
        key = key or message.partition(".")[0]
    nearest = _nearest(model, place) if "{nearest}" in _SENTENCES.get(kind, "") else ""
    sentence = _SENTENCES.get(kind, _ANY_OTHER)
    return key, sentence.format(key=key, place=place, keys=keys, found=found, message=message, nearest=nearest)


def _keys_of(model: type[BaseModel], section: str) -> list[str]:
    """Returns the keys of a `section`, or of one in a section; none for a key that stands alone, or an unknown one."""
    found = _section(model, section)
    return list(found.model_fields) if found else []


def _section(model: type[BaseModel], path: str) -> type[BaseModel] | None:
    """Returns the model of a section, `section` or `section.section`, or None where `path` names none."""
    found: type[BaseModel] | None = model
    for name in path.split("."):
        field = found.model_fields.get(name) if found else None
        annotation = field.annotation if field else None
        found = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return found


def _nearest(model: type[BaseModel], key: str) -> str:
    """Returns a hint that names the valid key whose last word is, or is most like, `key`'s; its own section's first."""
    if key in known_keys(model):  # as one word of a file
        *path, last = key.split(".")
        return f"; write {': {'.join(path)}: {{{last}: ...{'}' * len(path)}"
    section, dot, last = key.rpartition(".")
    if "." in section and section in known_keys(model) and not _section(model, section):
        return f"; {section} is one key and set whole"
    keys = _keys_of(model, section)
    tails = {name.rpartition(".")[2]: name for name in reversed(known_keys(model)) if "." in name or not dot}
    for words in (keys, tails):
        if close := difflib.get_close_matches(last.lower(), words, n=1):
            return f"; did you mean {f'{section}.{close[0]}' if words is keys else tails[close[0]]}?"
    if keys:
        return f"; {section} has {', '.join(keys)}"
    return f"; sections are {', '.join(name for name in model.model_fields if _keys_of(model, name))}"

"""The configuration of a run: YAML plus `section.key=value`, validated into documented, frozen models.

Every key is declared and explained here and nowhere else. Defaults are the DCGAN paper's (Radford et al. 2016) unless a
key says otherwise; configs/paintings64.yaml spells out the thesis' recipe.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gan_dist.errors import UserError

RESOLUTIONS = (32, 64, 128, 256)

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Target = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of keys: unknown ones are refused, types are not guessed, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class DataConfig(Section):
    shards: str
    """The dataset: a directory that `gan-dist prepare` wrote, or the address of one, which is then staged: http(s)://,
    s3://, gs://, `pipe:COMMAND` with {} for a file's name, file:// for a directory on a slow disk."""
    placement: Literal["auto", "device", "memory", "windowed"] = "auto"
    """Where samples wait: in GPU memory, memory-mapped on the host, or a moving window of shards. auto: the first of
    these that fits; windows for a remote set where window_shards is set."""
    window_shards: NonNegative = 0
    """Shuffle shards, then samples within windows of this many shards; 0 shuffles the whole set."""
    cache_dir: str | None = None
    """Where addresses are staged, once a node, and stay. null: $TMPDIR or /tmp, /dev/shm or ~/.cache, whichever first
    has room, until the last job that uses them ends."""
    x_flip: bool = False
    """Mirror each real image with probability one half."""


class ModelConfig(Section):
    resolution: int = 64
    """Side of the square images in pixels: 32, 64, 128 or 256; must be the dataset's."""
    latent_dim: Positive = 100
    """Numbers in a latent, drawn from N(0, 1)."""
    g_channels: Positive = 64
    """Width of the generator's last hidden layer; earlier layers double it down to 4x4 pixels."""
    d_channels: Positive = 64
    """Width of the discriminator's first layer; later layers double it down to 4x4 pixels."""
    leaky_slope: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Slope of LeakyReLU below zero."""
    init_std: PositiveFloat = 0.02
    """Weights start as N(0, init_std), batch-norm weights as N(1, init_std), biases as 0."""

    @model_validator(mode="after")
    def _resolution_is_built_for(self) -> ModelConfig:
        if self.resolution not in RESOLUTIONS:
            raise ValueError(f"model.resolution: expected a power of two from 32 to 256, found {self.resolution}")
        return self


class LossConfig(Section):
    name: Literal["minimax", "non_saturating"] = "non_saturating"
    """minimax: G minimises E log(1 - D(G(z))). non_saturating: G maximises E log D(G(z)). (Goodfellow 2014, eq. 1)"""
    real_target: Target = 1.0
    """D's target on real images; below 1 is one-sided label smoothing."""
    generator_target: Target | None = None
    """G's target on its own images (non_saturating only); null means 1."""

    @model_validator(mode="after")
    def _minimax_has_no_target(self) -> LossConfig:
        if self.name == "minimax" and self.generator_target is not None:
            raise ValueError(
                "loss.generator_target: minimax takes no generator target (G minimises log(1 - D(G(z)))), "
                f"found {self.generator_target}; set it to null, or loss.name=non_saturating"
            )
        return self


class OptimConfig(Section):
    g_lr: PositiveFloat = 2e-4
    """Adam's learning rate for the generator. Never scaled by batch or world size."""
    d_lr: PositiveFloat = 2e-4
    """Adam's learning rate for the discriminator."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.5, 0.999)
    """Adam's decay rates for the first and second moments."""
    d_steps: Positive = 1
    """Discriminator updates for each generator update (Goodfellow 2014, algorithm 1's k)."""


class TrainConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    epochs: PositiveFloat = 30.0
    """Passes over the dataset, counted in images that D has seen."""
    global_batch: Positive = 128
    """Real images in one D update, over all ranks together."""
    precision: Literal["auto", "bf16", "tf32", "fp32", "fp64"] = "auto"
    """auto: bf16 autocast where the device has it natively, else fp32. Weights and statistics stay fp32."""
    runner: Literal["auto", "eager", "compiled", "captured"] = "auto"
    """How the step is executed; auto takes the fastest that device and torch allow."""
    sync_batchnorm: bool = True
    """Normalise over the global batch. false normalises each rank's slice alone: another game, for experiments."""
    ema_half_life_images: NonNegative = 0
    """Images after which an averaged generator has forgotten half; 0 keeps none."""
    threads: Positive | None = None
    """CPU threads of torch in each rank; null keeps torch's choice (1 under torchrun). Changes bits on CPU."""
    deterministic: bool = False
    """Ask torch for deterministic kernels on the GPU too, at some cost."""
    stop_after_minutes: PositiveFloat | None = None
    """Save and end with status 75 after this long; null runs to the end."""


class LogConfig(Section):
    scalars_every: Positive = 50
    """Steps between points in TensorBoard, metrics.jsonl and the console."""
    samples_every: Positive = 200
    """Steps between grids of the fixed latents; one more is drawn at the end."""
    grid: Annotated[int, Field(ge=1, le=1024)] = 64
    """Images in a grid."""


class CheckpointConfig(Section):
    every_steps: NonNegative = 1000
    """Steps between checkpoints; 0 leaves it to minutes, epochs and the end."""
    every_minutes: NonNegativeFloat = 15.0
    """Minutes between checkpoints; 0 leaves it to steps, epochs and the end."""
    keep: Positive = 3
    """Newest checkpoints to keep."""
    keep_epochs: bool = False
    """Save at each epoch's end and keep those for good."""


class EvaluateConfig(Section):
    every_steps: NonNegative = 0
    """Steps between evaluations during training; 0 evaluates never."""
    samples: Positive = 10000
    """Generated and real images that an evaluation compares."""
    held_out: str | None = None
    """A dataset that is not trained on: does the discriminator know its images as it knows the others?"""


class DistConfig(Section):
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: nccl on GPUs, gloo elsewhere."""
    init_timeout_s: PositiveFloat = 600.0
    """Seconds to wait for all ranks to appear."""
    timeout_s: PositiveFloat = 300.0
    """Seconds after which a collective that does not finish means that a rank is lost."""


class Config(Section):
    seed: NonNegative = 0
    """Keys the initial weights, the order of images and every latent."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    dist: DistConfig = DistConfig()

    @model_validator(mode="after")
    def _placement_has_its_window(self) -> Config:
        if self.data.placement == "windowed" and self.data.window_shards == 0:
            raise ValueError("data.window_shards: placement windowed needs a window of 1 shard or more, found 0")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Returns the whole configuration as plain YAML values."""
        return self.model_dump(mode="json")


CHANGE_RULES: dict[str, Literal["free", "said", "upward"]] = {
    "data.shards": "free",  # the dataset itself is held by its manifest's hash
    "data.placement": "free",
    "data.cache_dir": "free",
    "train.epochs": "upward",
    "train.stop_after_minutes": "free",
    "train.device": "said",
    "train.precision": "said",
    "train.runner": "said",
    "train.threads": "said",
    "train.deterministic": "said",
    "log.": "free",
    "checkpoint.": "free",
    "evaluate.": "free",
    "dist.": "free",
}
"""What may differ when a run continues. `said` changes bits though not the game, so it is announced; keys (or whole
sections) that are not listed would make another run and are refused. The number of ranks is not a key: it is free."""

FIXED_FROM = ("model.",)
"""What a new run that starts from another's checkpoint (`--from`) must share with it: the shapes."""


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


def _sections(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel] | None]]:
    for name, field in model.model_fields.items():
        annotation = field.annotation
        yield name, annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def known_keys() -> list[str]:
    """Returns every key as `section.key`, and the section names themselves."""
    keys: list[str] = []
    for name, section in _sections(Config):
        keys.append(name)
        keys += [f"{name}.{key}" for key in section.model_fields] if section else []
    return keys


def _nearest(key: str) -> str:
    """Returns a hint that names the valid key most like `key`: same last word first, then by spelling."""
    known = known_keys()
    last = key.rsplit(".", 1)[-1]
    same_word = [name for name in known if name.rsplit(".", 1)[-1] == last]
    close = same_word or difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    if not close:
        tails = {name.rsplit(".", 1)[-1]: name for name in known}
        close = [tails[tail] for tail in difflib.get_close_matches(last, tails, n=1, cutoff=0.4)]
    return f"; did you mean {close[0]}?" if close else f"; sections are {', '.join(n for n, _ in _sections(Config))}"


def _explain(error: ValidationError, origin: str) -> UserError:
    """Returns the first fault of a validation as one line: key, expected, found."""
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"] if not (isinstance(part, str) and part.startswith("function-")))
    found = fault.get("input")
    if fault["type"] == "extra_forbidden":
        return UserError(f"{origin}: unknown key {key}{_nearest(key)}")
    if fault["type"] == "missing":
        return UserError(f"{origin}: {key} is missing" + ("; name a dataset" if key == "data.shards" else ""))
    if fault["type"] == "value_error":
        return UserError(f"{origin}: {fault['msg'].removeprefix('Value error, ')}")
    expected = fault["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return UserError(f"{origin}: {key}: expected {expected}, found {found!r}")


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


def load_config(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """Returns the validated configuration of a YAML file or a plain mapping, with `section.key=value` words applied.

    Paths come out absolute. Raises UserError with one line naming the key and what to do.
    """
    if isinstance(source, Config):
        values, origin = source.to_dict(), "configuration"
    elif isinstance(source, Mapping):
        values, origin = {key: dict(v) if isinstance(v, Mapping) else v for key, v in source.items()}, "configuration"
    else:
        path = Path(expand_path(str(source)))
        values, origin = read_yaml(path), str(source)
    for key, value in parse_overrides(overrides).items():
        head, _, tail = key.partition(".")
        if key not in known_keys():
            raise UserError(f"unknown key {key}{_nearest(key)}")
        if not tail and (section_model := dict(_sections(Config))[head]):
            raise UserError(f"{key} is a section; set one of its keys: {', '.join(section_model.model_fields)}")
        if tail:
            section = values.get(head)
            values[head] = {**section, tail: value} if isinstance(section, dict) else {tail: value}
        else:
            values[head] = value
    # An empty section ("optim:" with nothing under it) reads as null; it means the defaults.
    values = {key: {} if value is None and dict(_sections(Config)).get(key) else value for key, value in values.items()}
    for head, key in (("data", "shards"), ("data", "cache_dir"), ("evaluate", "held_out")):
        section = values.get(head)
        if isinstance(section, dict) and isinstance(section.get(key), str):
            values[head] = {**section, key: expand_path(section[key])}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error, origin) from None


def preset(name: str) -> Config:
    """Returns a configuration that comes with gan_dist: `demo` or `paintings64`."""
    here = Path(__file__).parent
    # In a wheel the presets lie inside the package; in a checkout, configs/ beside it is the one place to edit them.
    homes = (here / "configs", here.parent / "configs")
    return load_config(next((home / f"{name}.yaml" for home in homes if home.is_dir()), homes[0] / f"{name}.yaml"))


def presets() -> dict[str, dict[str, Any]]:
    """Returns the configurations that come with gan_dist by name, as plain nested values."""
    return {name: preset(name).to_dict() for name in ("paintings64", "demo")}


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


def change_rule(key: str) -> str:
    """Returns how `key` may move when a run continues: free, said, upward, or never."""
    section = key.split(".")[0] + "."
    return CHANGE_RULES.get(key, CHANGE_RULES.get(section, "never"))


def to_yaml(config: Config) -> str:
    """Returns the configuration as YAML text that load_config reads back equal."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)

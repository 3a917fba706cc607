"""Generators as files: out to safetensors with a model card, in from there and from other programs' files."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gan_dist.config.schema import RESOLUTIONS
from gan_dist.data.classes import NO_CLASSES, Classes
from gan_dist.model.convolution import fold
from gan_dist.model.networks import CLASS_DIM, Generator
from gan_dist.utils.errors import UserError, first_line
from gan_dist.utils.files import expand, write_atomically

CONTAINERS = ("generator_ema", "generator", "netG", "G", "model_state_dict", "state_dict", "model")
"""Names under which programs keep a generator's weights beside other things; the first that is there is taken."""

SNIPPET = """\
import torch
from safetensors.torch import load_file
from torch import nn

weights = load_file("{file}")
{table}layers = sum(name.startswith("convt") for name in weights)
stack = nn.Sequential()
for i in range(1, layers + 1):
    a, b = weights[f"convt{{i}}.weight"].shape[:2]
    stride, padding = (1, 0) if i == 1 else (2, 1)
    stack.add_module(f"convt{{i}}", nn.ConvTranspose2d(a, b, 4, stride, padding, bias=False))
    if i < layers:
        stack.add_module(f"bn{{i}}", nn.BatchNorm2d(b))
        stack.add_module(f"relu{{i}}", nn.ReLU())
stack.add_module("tanh", nn.Tanh())
stack.load_state_dict(weights)
stack.eval()

latents = torch.randn(16, {latent_dim}, 1, 1)  # N(0, 1)
{choice}with torch.no_grad():
    images = stack(latents)  # [16, 3, {resolution}, {resolution}] in [-1, 1]
"""
"""Loads an exported generator with torch and safetensors alone; the two parts below are for one with classes."""
TABLE = """\
table = weights.pop("class_table")  # a row for each class, the first for images without one
table = table * (table.square().sum(1, keepdim=True) + 1e-8).rsqrt()
"""
CHOICE = """\
classes = {names}
vector = table[1 + classes.index({name})]
latents = torch.cat([latents, vector[None, :, None, None].expand(16, -1, 1, 1)], 1)
"""


def export_generator(generator: Generator, out: str | Path, facts: Mapping[str, Any]) -> tuple[Path, Path]:
    """Returns (weights, card): the safetensors file `out` and the Markdown beside it that says what it is.

    facts: what the card lists (run, step, images_seen, config, dataset, ...); nested mappings become lists.
    Weights are float32, under the names of the thesis' code. Raises UserError for a name that does not end in
    .safetensors, and for a generator with residual blocks.
    """
    path = expand(out)
    if path.suffix != ".safetensors":
        raise UserError(f"--export: expected a file name ending in .safetensors, found {path.name}")
    check_exportable(generator)
    weights = {name: _plain(value) for name, value in generator.state_dict().items()}
    shape = {"resolution": generator.resolution, "latent_dim": generator.latent_dim}
    described = {"format": "gan_dist generator 1", **{key: str(value) for key, value in shape.items()}}
    if generator.num_classes:
        described["classes"] = json.dumps(generator.classes.to_dict())
    content = safetensors.torch.save(weights, metadata=described)
    card = _card(path.name, generator, facts, hashlib.sha256(content).hexdigest())
    write_atomically(path, content, make_folder=True)
    write_atomically(path.with_suffix(".md"), card.encode())
    return path, path.with_suffix(".md")


def check_exportable(generator: Generator) -> None:
    """Raises UserError unless `generator` is a plain stack of layers, which other programs can load."""
    if generator.blocks != "plain":
        raise UserError(
            f"--export: a generator with model.blocks={generator.blocks} is no plain stack of layers, which other "
            "programs could load; draw from the run itself, or train with model.blocks=plain"
        )


def _plain(value: Tensor) -> Tensor:
    copied = value.detach().to("cpu", copy=True).contiguous()
    if copied.shape[2:] == (3, 3):  # model.upsample=nearest, written as the transposed convolution that it equals
        copied = fold(copied).contiguous()
    return copied.float() if copied.is_floating_point() else copied


def _card(file: str, generator: Generator, facts: Mapping[str, Any], digest: str) -> str:
    count = sum(parameter.numel() for parameter in generator.parameters())
    lines, classes = [], generator.classes
    snippet = {"file": file, "latent_dim": generator.latent_dim, "resolution": generator.resolution}
    snippet |= {"table": "", "choice": ""}
    asking, knows = ",", ""
    if classes.names:
        one = classes.names[classes.largest(1)[0] - 1]
        snippet |= {"table": TABLE, "choice": CHOICE.format(names=list(classes.names), name=repr(one))}
        asking = f", `--class {shlex.quote(one)}` for one class,"
        counts = "; ".join(f"{name} ({count:,})" for name, count in zip(classes.names, classes.images[1:], strict=True))
        knows = f"It knows {len(classes.names):,} classes (and the images of each that it learned from): {counts}."
    for key, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"- {key}:", *(f"  - {inner}: {json.dumps(one)}" for inner, one in value.items())]
        elif value is not None:
            lines.append(f"- {key}: {value}")
    return "\n".join(
        [
            f"# {file}",
            "",
            f"A DCGAN generator (Radford et al. 2016): latents of {generator.latent_dim} numbers from N(0, 1) to RGB "
            f"images of {generator.resolution}x{generator.resolution} pixels in [-1, 1]. {count:,} parameters, "
            "float32, batch norm with running statistics. It repeats the biases of the images it was trained on, "
            "and its images are no work of the artists who made those.",
            *(["", knows] if knows else []),
            "",
            "## Where it comes from",
            "",
            *lines,
            f"- sha256: {digest}",
            "",
            "## How to load it",
            "",
            f"`gan-dist sample {file} --out grid.png`{asking} or with torch and safetensors alone:",
            "",
            "```python",
            SNIPPET.format(**snippet).rstrip(),
            "```",
            "",
        ]
    )


def load_weights(source: str | Path, device: torch.device | str = "cpu") -> Generator:
    """Returns the generator in a file, in eval mode: one that export_generator wrote, or another program's.

    Reads safetensors, and torch files with nothing but tensors and plain values in them: a DCGAN generator's state_dict
    under the thesis' names (convt1, bn1, ...) or by the order of its layers (main.0, main.1, ... of the PyTorch
    tutorial), alone or inside a checkpoint, also of a DataParallel wrapper. Raises UserError when it is no such file,
    or no such generator; nothing in it is executed.
    """
    path = expand(source)
    if not path.is_file():
        raise UserError(f"no file {path}; expected a generator's weights (.safetensors, .pt or .pth)")
    weights = _named_as_ours(_find_weights(_read(path), path), path)
    classes = _classes_in(path, weights)
    wide = weights.get("convt1.weight")
    depth = sum(re.fullmatch(r"convt\d+\.weight", name) is not None for name in weights)
    if wide is None or 4 * 2 ** (depth - 1) not in RESOLUTIONS:
        sides = ", ".join(map(str, RESOLUTIONS))
        raise UserError(f"{path}: {depth} transposed convolutions; a generator of {sides} pixels has 4, 5, 6 or 7")
    resolution, latent_dim = 4 * 2 ** (depth - 1), wide.shape[0] - (CLASS_DIM if classes.names else 0)
    narrowest, widest = weights[f"convt{depth}.weight"].shape[0], wide.shape[1] if wide.dim() > 1 else None
    generator = Generator(resolution, latent_dim, narrowest, max_channels=widest, classes=classes)
    expected = generator.state_dict()
    for name, value in expected.items():
        if name not in weights and name.endswith("num_batches_tracked"):
            weights[name] = torch.zeros_like(value)  # files of torch before 0.4.1 have none
        elif name not in weights:
            raise UserError(f"{path}: no {name}; expected the weights of a DCGAN generator without convolution biases")
        elif weights[name].shape != value.shape:
            shape, wanted = list(weights[name].shape), list(value.shape)
            raise UserError(f"{path}: {name} has shape {shape}, a {resolution}-pixel DCGAN has {wanted} there")
    if left := sorted(weights.keys() - expected.keys()):
        raise UserError(f"{path}: {left[0]} has no place in a DCGAN generator ({len(left)} such entries)")
    generator.load_state_dict(weights)
    return generator.to(device).eval()


def _classes_in(path: Path, weights: Mapping[str, Tensor]) -> Classes:
    """Returns the classes of the generator in a file, by number where it does not name them."""
    table = weights.get("class_table")
    if table is None:
        return NO_CLASSES
    count, text = (len(table) - 1 if table.dim() == 2 else 0), None
    if path.suffix == ".safetensors":
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("classes")
    if text is None:
        return Classes(tuple(str(number) for number in range(1, 1 + count)), (0, *[1] * count))
    try:
        said = json.loads(text)
        found, fits = Classes.of_state({"classes": said}), isinstance(said["names"], list)
        fits &= all(isinstance(name, str) for name in found.names) and sum(found.images) > 0 <= min(found.images)
        if fits and len(found.names) == count == len(found.images) - 1:
            return found
    except (ValueError, TypeError, AttributeError, KeyError):
        pass
    raise UserError(f"{path}: what it says of its classes does not fit its table of {count}")


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            with safe_open(str(path), framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a safetensors file: {error}") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise UserError(
            f"{path} holds more than tensors{what} and was not opened, because loading it could run code; "
            "save the generator's state_dict() and pass that file"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a file of torch tensors: {first_line(error)}") from None


def _find_weights(loaded: Any, path: Path) -> dict[str, Tensor]:
    """Returns the generator's tensors by name, from a state_dict or from a checkpoint that has one inside."""
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path}: expected a state_dict, found {type(loaded).__name__}")
    if loaded and all(isinstance(value, Tensor) for value in loaded.values()):
        return dict(loaded)
    for name in CONTAINERS:
        if isinstance(inner := loaded.get(name), Mapping) and inner:
            return _find_weights(inner, path)
    raise UserError(
        f"{path}: no generator in it; looked for {', '.join(CONTAINERS)}, found {', '.join(map(str, loaded))}"
    )


def _named_as_ours(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Returns the tensors under our names: convt1..N and bn1..N-1, by theirs or by the order of the layers."""
    plain = {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in weights.items()}
    if "convt1.weight" in plain:
        return plain
    layers = dict.fromkeys(name.rpartition(".")[0] for name in plain)
    ordered = sorted(layers, key=lambda layer: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", layer)])
    renamed: dict[str, str] = {}
    for layer in ordered:
        weight = plain.get(f"{layer}.weight")
        kind = "convt" if weight is not None and weight.dim() == 4 else "bn"
        renamed[layer] = f"{kind}{1 + sum(name.startswith(kind) for name in renamed.values())}"
    if not any(name.startswith("convt") for name in renamed.values()):
        raise UserError(f"{path}: no transposed convolution in it; expected the state_dict of a DCGAN generator")
    return {f"{renamed[layer]}.{last}": plain[name] for name in plain for layer, _, last in [name.rpartition(".")]}

"""A run at more pixels that begins with one at fewer: layers of the same side are taken over, the others start fresh.

G's layers are counted from its 4x4 end, so they keep their names, all but the last one, which made the image. D's are
counted from the image, so they move back by one for each doubling, all but the first one, which read it. Optimisers
start fresh: moments of gradients that came through other layers are no guide. Larger networks are not faded in as in
Karras et al. 2018 (arXiv:1710.10196): the step from one loss to the other is left to Adam.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gan_dist.model.networks import layer_widths
from gan_dist.utils.errors import UserError

SHAPELESS = ("init", "init_std", "classes_min_images")
"""Keys of `model` that say nothing of the networks that a run begins with; classes are compared name for name."""
SIZES = ("resolution", "g_channels", "d_channels", "max_channels")
"""Keys of `model` that may differ as long as layers of the same side are alike."""
LAYER = re.compile(r"(convt|conv|bn|block)(\d+)(\..+)")


def misfit(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Returns why networks of the `model` section `new` cannot begin with those of `old`, or None where they can.

    Both have all keys of the section. They can where both are of one resolution and equal, and where `new` has more
    pixels and layers of the same side are as wide.
    """
    for key in new:
        if key not in (*SHAPELESS, *SIZES) and old.get(key) != new[key]:
            return f"model.{key} is {old.get(key)} there and {new[key]} here; the networks' shapes must be equal"
    before, after = old["resolution"], new["resolution"]
    if before > after:
        return f"model.resolution is {before} there and {after} here; a run grows to more pixels, never to fewer"
    apart = next((key for key in ("g_channels", "d_channels") if not _shares(old, new, key)), None)
    if apart is None:
        return None
    if before == after:
        key = apart if old[apart] != new[apart] else "max_channels"
        return f"model.{key} is {old[key]} there and {new[key]} here; the networks' shapes must be equal"
    name = "generator" if apart == "g_channels" else "discriminator"
    theirs, ours = (", ".join(map(str, _widths(section, apart))) for section in (old, new))
    words = _fitting(old, new)
    remedy = f"set {words}" if words else "no widths here would fit those; train that run anew with widths that halve"
    return (
        f"a run of {before} pixels grows to {after} where layers of the same side are as wide, but the {name} has "
        f"{theirs} channels from 4x4 pixels on there and {ours} here; {remedy}"
    )


def _widths(model: Mapping[str, Any], key: str) -> list[int]:
    return layer_widths(model["resolution"], model[key], model["max_channels"])


def _shares(old: Mapping[str, Any], new: Mapping[str, Any], key: str) -> bool:
    """Returns whether the layers of `old` are the first ones, from 4x4 pixels on, of `new`."""
    return _widths(new, key)[: len(_widths(old, key))] == _widths(old, key)


def _fitting(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Returns the `model.KEY=VALUE` words with which `new` would fit `old`, nothing where there are none."""
    times = new["resolution"] // old["resolution"]
    for widest in dict.fromkeys((new["max_channels"], old["max_channels"])):
        tried = {**new, "max_channels": widest}
        for key in ("g_channels", "d_channels"):
            narrowest = (new[key], old[key] // times, old[key])
            fits = (each for each in narrowest if each and _shares(old, {**tried, key: each}, key))
            tried[key] = next(fits, None)
        if tried["g_channels"] and tried["d_channels"]:
            moved = [key for key in SIZES if tried[key] != new[key]]
            return " ".join(f"model.{key}={'null' if tried[key] is None else tried[key]}" for key in moved)
    return ""


def grow(
    state: Mapping[str, Any], networks: Mapping[str, Mapping[str, Tensor]], resolution: int
) -> tuple[dict[str, Any], list[str]]:
    """Returns what networks of `resolution` begin with, and a line for each that says which of its layers are fresh.

    state: a checkpoint of fewer pixels, fit by `misfit`; networks: the state_dicts of a freshly initialised generator
    and discriminator. The result has the `state`'s networks, the average included where there is one, in the new
    shapes, and no optimisers. Raises UserError for a tensor whose shape is another here.
    """
    before = int(state["config"]["model"].get("resolution", 64))
    doublings = (resolution // before).bit_length() - 1
    grown, lines = {}, []
    for name in [key for key in ("generator", "generator_ema", "discriminator") if state.get(key)]:
        fresh = networks["discriminator" if name == "discriminator" else "generator"]
        taken = _taken(state[name], doublings, name == "discriminator")
        for key, value in taken.items():
            if key not in fresh or fresh[key].shape != value.shape:
                found = f"shape {list(fresh[key].shape)}" if key in fresh else "no such tensor"
                raise UserError(f"--from: the {name}'s {key} has shape {list(value.shape)} there, {found} here")
        grown[name] = {**fresh, **taken}
        if name != "generator_ema":
            kept, new = (dict.fromkeys(key.partition(".")[0] for key in keys) for keys in (taken, fresh.keys() - taken))
            lines.append(
                f"{name} grown from {before} to {resolution} pixels: {_listed(kept)} taken over, "
                f"{_listed(new)} fresh, its optimiser too"
            )
    return grown, lines


def _taken(network: Mapping[str, Tensor], doublings: int, of_discriminator: bool) -> dict[str, Tensor]:
    """Returns the tensors of `network` that larger networks have as well, by their names there."""
    layers = {name: LAYER.fullmatch(name) for name in network}
    last = max((int(found[2]) for found in layers.values() if found and found[1] == "convt"), default=0)
    taken = {}
    for name, found in layers.items():
        if not found:
            taken[name] = network[name]
        elif of_discriminator and (found[1], found[2]) != ("conv", "1"):
            taken[f"{found[1]}{int(found[2]) + doublings}{found[3]}"] = network[name]
        elif not of_discriminator and (found[1], int(found[2])) != ("convt", last):
            taken[name] = network[name]
    return taken


def _listed(layers: Mapping[str, Any]) -> str:
    """Returns names such as `bn1 to bn4, convt1 to convt4`, sorted."""
    split = (re.fullmatch(r"(.*?)(\d*)", layer) for layer in layers)
    numbers = sorted((found[1], int(found[2] or 0)) for found in split if found)
    runs = []
    for kind, group in itertools.groupby(numbers, key=lambda each: each[0]):
        places = [number for _, number in group]
        ends = [f"{kind}{number or ''}" for number in (places[0], places[-1])]
        runs.append(" to ".join(dict.fromkeys(ends)))
    return ", ".join(runs)

"""The Triton kernels compile for the GPUs we mean, ahead of time and without one: no spills, accesses of 16 bytes."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="needs Triton, which torch brings on Linux")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gan_dist.model import batchnorm_triton as kernels  # noqa: E402
from gan_dist.model import image_layers_triton, losses_triton  # noqa: E402

ARCHITECTURES = (80, 90, 100)
"""A100, H100 and H200, B200."""
THREADS = 32 * kernels.WARPS
MAPS: dict[str, tuple[int, int]] = {
    "_statistics_kernel": (1, 0),
    "_normalise_kernel": (1, 1),
    "_chunk_sums_kernel": (2, 0),
    "_input_gradient_kernel": (2, 1),
}
"""Kernels that walk over maps, with how many they read and how many they write."""
SMALL = ("_merge_kernel", "_add_sums_kernel", "_track_kernel")
BYTES = {"bf16": 2, "fp32": 4}


def _compile(name: str, dtype: str, arch: int, channels_divisible: bool = True) -> Any:
    """Returns Triton's result for 64 channels or more, specialised as a launch with aligned tensors is."""
    function = getattr(kernels, name)
    constants: dict[str, Any] = {"EPS": 1e-5, "SLOPE": 0.2, "MOMENTUM": 0.1}
    constants |= {"PARTS": kernels.MERGED_PARTS, "CHANNELS": kernels.MERGED_CHANNELS}
    if name in MAPS:
        constants |= kernels._tile(128)
    constants = {key: value for key, value in constants.items() if key in function.arg_names}
    maps, counts = ("x", "y", "dx", "dy"), ("rows", "channels", "chunk", "parts", "groups")
    types = {
        key: "constexpr"
        if key in constants
        else "i32"
        if key in counts
        else f"*{dtype}"
        if key in maps
        else "*i64"
        if key == "num_batches"
        else "*fp32"
        for key in function.arg_names
    }
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (index,): aligned
        for index, (key, kind) in enumerate(types.items())
        if kind[0] == "*" or (key == "channels" and channels_divisible)
    }
    return _build(function, types, constants, attributes, arch, kernels.WARPS if name in MAPS else 4)


def _build(function: Any, types: Any, constants: dict[str, Any], attributes: Any, arch: int, warps: int) -> Any:
    places = {(function.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(function, types, places, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


def _wide_accesses(ptx: str) -> Counter[str]:
    """Returns how many 16 bytes a thread loads, and stores, by instructions of 16 bytes or more."""
    counted: Counter[str] = Counter()
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global\S*?\.v([248])\.[bfsu](\d+)", ptx):
        counted[kind] += int(vector) * int(bits) // 128
    return counted


def _resources(compiled: Any, folder: Path) -> dict[str, int]:
    """Returns what cuobjdump says of the machine code: registers, bytes of stack and of local memory."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    told = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # else Triton 3.9 warns
    yield


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("name", MAPS)
def test_kernels_over_maps_access_16_bytes_and_spill_nothing(name: str, dtype: str, arch: int, tmp_path: Path) -> None:
    compiled = _compile(name, dtype, arch)
    reads, writes = MAPS[name]
    wide, tile = _wide_accesses(compiled.asm["ptx"]), kernels.TILE * BYTES[dtype] // (16 * THREADS)
    assert wide["ld"] >= reads * tile
    assert wide["st"] >= writes * tile
    assert not re.search(r"\b(ld|st)\.global\S*\.[bu]16\b", compiled.asm["ptx"])
    used = _resources(compiled, tmp_path)
    assert used["LOCAL"] == 0 and used["STACK"] == 0
    # Two programs on a multiprocessor at least: 16 KB of each map on their way, when 15 fill an H100's memory bus.
    assert used["REG"] * THREADS * 2 <= 65536


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SMALL)
def test_the_small_kernels_spill_nothing(name: str, arch: int, tmp_path: Path) -> None:
    used = _resources(_compile(name, "fp32", arch), tmp_path)
    assert used["LOCAL"] == 0 and used["STACK"] == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("player", "name"), [("discriminator", "non_saturating"), ("generator", "relativistic")])
def test_the_losses_kernel_spills_nothing(player: str, name: Any, arch: int, tmp_path: Path) -> None:
    function, constants = losses_triton._losses_kernel, losses_triton._constants(player, name, 0.9, 128)
    pointers = {"logits": "*bf16", "loss": "*fp32", "sums": "*fp32", "gradient": "*bf16", "size": "i32"}
    types = {key: pointers.get(key, "constexpr") for key in function.arg_names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(types.values()) if kind[0] == "*"}
    used = _resources(_build(function, types, constants, aligned, arch, 4), tmp_path)
    assert used["LOCAL"] == 0 and used["STACK"] == 0


IMAGE_LAYERS: dict[str, dict[str, int]] = {
    "_to_maps_kernel": {"st": 1},
    "_to_images_kernel": {"ld": 8},  # four pixels of maps for each block, and of what was activated
    "_weight_gradient_kernel": {},  # Hopper and later load what they multiply by another instruction
}
"""Kernels between images and maps, with how often they read or write a tile of maps, 16 bytes at a time."""


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", IMAGE_LAYERS)
def test_the_layers_at_images_access_maps_by_16_bytes_and_spill_nothing(name: str, arch: int, tmp_path: Path) -> None:
    function, tile = getattr(image_layers_triton, name), image_layers_triton._tile(64)
    constants = {"SIDE": 32, "SLOPE": 0.2, "BIASED": True, "MASKED": True, "ONE": 12, **tile}
    constants = {key: value for key, value in constants.items() if key in function.arg_names}
    counts = ("pixels", "channels", "blocks", "chunk")
    kinds = dict.fromkeys(counts, "i32") | {"parts": "*fp32"} | dict.fromkeys(constants, "constexpr")
    types = {key: kinds.get(key, "*bf16") for key in function.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (key, kind) in enumerate(types.items())
        if kind[0] == "*" or key == "channels"
    }
    compiled = _build(function, types, constants, aligned, arch, 4)
    wide = _wide_accesses(compiled.asm["ptx"])
    for kind, tiles in IMAGE_LAYERS[name].items():
        assert wide[kind] >= tiles * tile["PIXELS"] * tile["CHANNELS"] * BYTES["bf16"] // (16 * 128)
    used = _resources(compiled, tmp_path)
    assert used["LOCAL"] == 0 and used["STACK"] == 0


def test_a_narrow_access_is_seen() -> None:
    ptx = _compile("_normalise_kernel", "bf16", 90, channels_divisible=False).asm["ptx"]
    assert _wide_accesses(ptx)["st"] == 0
    assert re.search(r"\bst\.global\S*\.[bu]16\b", ptx)

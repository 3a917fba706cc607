"""The fused kernels give torch's results: in Triton's interpreter, against float64, alone and over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gan_dist.distributed.world import World
from gan_dist.model import kernels
from gan_dist.model.kernels import resolve_kernels
from gan_dist.utils.errors import UserError
from tests.helpers.games import worst
from tests.helpers.interpreted import EPS, EXAMPLES, MOMENTUM, SHARED, SIZES, Example, interpreted, share, step_state

pytest.importorskip("triton", reason="needs Triton, which torch brings on Linux")
pytestmark = pytest.mark.timeout(600)  # the first test waits for all that is played, ten minutes on a busy machine

TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 0.01}
"""Of a result's norm. bfloat16 rounds to 8 bits what is written, y and dx; the rest stays float32."""


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each rank of each world found."""
    out = tmp_path_factory.mktemp("interpreted")
    done = interpreted("main(sys.argv[1])", out)
    assert done.returncode == 0, done.stdout
    return out


@pytest.fixture(scope="module")
def worlds(played: Path) -> dict[int, list[dict[str, Any]]]:
    """What each rank found, by the size of its world."""
    return {size: [torch.load(played / f"{size}-{rank}.pt") for rank in range(size)] for size in SIZES}


def _expected(example: Example) -> dict[str, Tensor]:
    """Returns what torch computes in float64 for the whole batch."""
    x, dy, weight, bias = (values.double() for values in example.arrays())
    leaves = [values.requires_grad_() for values in (x, weight, bias)]
    running = torch.zeros_like(weight), torch.ones_like(weight)
    parts = [F.batch_norm(part, *running, weight, bias, True, MOMENTUM, EPS) for part in x]
    y = F.leaky_relu(torch.stack(parts), example.slope)
    dx, dweight, dbias = torch.autograd.grad(y, leaves, dy)
    return {
        "y": y.detach(), "dx": dx, "dweight": dweight, "dbias": dbias, "mean": running[0], "var": running[1]
    }  # fmt: skip


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "size"), [(name, n) for name in EXAMPLES for n in SIZES if n == 1 or name in SHARED])
def test_they_equal_torch_in_float64(worlds: dict[int, list[dict[str, Any]]], name: str, size: int) -> None:
    example, ranks = EXAMPLES[name], [found[name] for found in worlds[size]]
    expected, exact = _expected(example), TOLERANCES[torch.promote_types(example.dtype, torch.float32)]
    for key in ("y", "dx"):
        assert ranks[0][key].dtype == example.dtype
        found, tolerance = torch.cat([rank[key] for rank in ranks], 1), example.tolerance or TOLERANCES[example.dtype]
        assert _error(found, expected[key]) < tolerance, key
    for key in ("dweight", "dbias"):  # each rank has its share of the sum
        found = torch.stack([rank[key].double() for rank in ranks]).sum(0)
        assert _error(found, expected[key]) < (example.tolerance or exact), key
    for key in ("mean", "var"):
        assert _error(ranks[0][key], expected[key]) < exact, key
        assert all(torch.equal(rank[key], ranks[0][key]) for rank in ranks), f"ranks differ in {key}"
    assert all(rank["batches"] == example.groups for rank in ranks)


def test_the_comparison_sees_ranks_that_do_not_share_statistics(worlds: dict[int, list[dict[str, Any]]]) -> None:
    name = "ReLU, groups"
    example, (found,) = EXAMPLES[name], [found[name] for found in worlds[1]]
    x, _, weight, bias = (values.double() for values in example.arrays())
    alone = [
        F.relu(F.batch_norm(x[0, share(example, rank, 2)], None, None, weight, bias, True, eps=EPS)) for rank in (0, 1)
    ]
    assert _error(found["y"][0], torch.cat(alone)) > 0.05


@pytest.mark.parametrize(("how", "size"), [("step", 1), ("step", 2), ("compiled step", 2)])
def test_the_game_is_the_same(worlds: dict[int, list[dict[str, Any]]], size: int, how: str) -> None:
    expected = step_state(World(), "torch")
    for found in worlds[size]:
        assert worst(found[how], expected) < 1e-12


def test_a_cpu_takes_torchs_operations_and_refuses_tritons() -> None:
    assert resolve_kernels("auto", World(), torch.float32) == (
        "torch",
        "Triton's are for GPUs, and this rank drives cpu",
    )
    with pytest.raises(UserError, match=r"train\.batchnorm_kernels=triton is for GPUs, but this rank drives cpu"):
        resolve_kernels("triton", World(), torch.float32)
    with pytest.raises(UserError, match="expected auto, torch, triton, found 'cudnn'"):
        resolve_kernels("cudnn", World(), torch.float32)


class _Kernels:
    """In the place of the module of kernels: its check raises `error`."""

    checked: ClassVar[list[object]] = []

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def check(self, device: torch.device, what: object = "images", *loss: str) -> None:
        self.checked.append(what)
        if self.error:
            raise self.error


def test_a_gpu_takes_tritons_where_they_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = World(device=torch.device("cuda", 0))
    _Kernels.checked.clear()
    monkeypatch.setattr(kernels, "import_module", lambda name: _Kernels(None))
    assert resolve_kernels("auto", gpu, torch.bfloat16) == (
        "triton",
        "fused with the activation; losses and the layers at images have kernels too",
    )
    # Maps, images, logits, logits with a bias.
    assert _Kernels.checked == [torch.bfloat16, "images", torch.bfloat16, torch.float32]
    other: list[Any] = [(torch.float32,), (torch.bfloat16, "hinge", None)]  # None: gradients are differentiated
    for words in other:
        assert resolve_kernels("auto", gpu, *words)[1] == "fused with the activation; losses have kernels too"
    assert resolve_kernels("torch", gpu, torch.bfloat16)[0] == "torch"
    for broken in ("batchnorm", "image_layers", "losses"):
        failing = _Kernels(RuntimeError("Failed to find C compiler\n"))
        monkeypatch.setattr(
            kernels, "import_module", lambda name, it=broken, to=failing: to if it in name else _Kernels(None)
        )
        chosen, why = resolve_kernels("auto", gpu, torch.bfloat16)
        assert chosen == "torch"
        assert why == "Triton's kernels fail on rank 0 (RuntimeError: Failed to find C compiler)"
    with pytest.raises(UserError, match=r"batchnorm_kernels=triton, but .* Failed to find C compiler"):
        resolve_kernels("triton", gpu, torch.bfloat16)
    with pytest.raises(torch.OutOfMemoryError):  # no fault of the kernels
        monkeypatch.setattr(kernels, "import_module", lambda name: _Kernels(torch.OutOfMemoryError("no memory")))
        resolve_kernels("auto", gpu, torch.bfloat16)


def test_one_rank_that_cannot_build_them_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "import_module", lambda name: _Kernels(None))
    monkeypatch.setattr(World, "gather_objects", lambda self, mine: [mine, "OSError: no space"])
    chosen, why = resolve_kernels("auto", World(0, 2, device=torch.device("cuda", 0)), torch.float32)
    assert (chosen, why) == ("torch", "Triton's kernels fail on rank 1 (OSError: no space)")


def test_the_check_passes_right_kernels_and_sees_wrong_ones(played: Path) -> None:
    checks = torch.load(played / "checks.pt")
    assert checks["right"] == ["", "", ""]
    assert all(text.startswith("gradient differs from torch's by more than") for text in checks["wrong"])


def test_without_triton_everything_but_its_kernels_works(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('no Triton here')\n")
    done = interpreted("without_triton()", path=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "torch: Triton's kernels fail on rank 0 (ImportError: no Triton here)"

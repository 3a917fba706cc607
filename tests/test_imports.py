"""Imports point down the list of folders, late ones too, and no modules import one another in a circle."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    "gan_dist.utils gan_dist.config gan_dist.distributed",
    "gan_dist.data gan_dist.model",
    "gan_dist.runs gan_dist.sampling gan_dist.telemetry gan_dist.evaluation",
    "gan_dist.report gan_dist.training",
    "gan_dist.bench gan_dist.doctor",
    "gan_dist.cli",
    "launch gan_dist.__main__",
)
"""Lowest first. A folder may import from lower layers, and from its own as long as there is no circle."""


def level(module: str) -> int:
    """Returns the layer of a module; gan_dist itself, which only names what others hold, is the lowest."""
    return next((n for n, layer in enumerate(LAYERS) for folder in layer.split() if module.startswith(folder)), -1)


@cache
def arrows(root: Path) -> dict[str, set[str]]:
    """Returns {module: modules of ours that it imports, anywhere in it}."""
    paths = [*root.glob("gan_dist/**/*.py"), *root.glob("launch/**/*.py")]
    names = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    found: dict[str, set[str]] = {}
    for module, path in names.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):  # `from a import b` may mean the module a.b
                words = [
                    f"{node.module}.{word}" if f"{node.module}.{word}" in names else f"{node.module}" for word in words
                ]
            found.setdefault(module, set()).update(word for word in words if word in names)
    return {module: targets for module, targets in found.items() if module != "gan_dist"}


def upward(root: Path) -> list[str]:
    """Returns the imports that point up the list."""
    return [f"{a} -> {b}" for a, targets in arrows(root).items() for b in sorted(targets) if level(b) > level(a)]


def test_imports_point_down_and_make_no_circle() -> None:
    assert upward(ROOT) == []
    TopologicalSorter(arrows(ROOT)).prepare()


def test_both_faults_are_seen(tmp_path: Path) -> None:
    for name, text in (("utils/low", "from gan_dist.cli import high"), ("cli/high", "import gan_dist.utils.low")):
        (tmp_path / "gan_dist" / name).parent.mkdir(parents=True)
        (tmp_path / "gan_dist" / f"{name}.py").write_text(f"def late():\n    {text}\n")
    assert upward(tmp_path) == ["gan_dist.utils.low -> gan_dist.cli.high"]
    with pytest.raises(CycleError):
        TopologicalSorter(arrows(tmp_path)).prepare()

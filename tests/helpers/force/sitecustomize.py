"""Python imports this first where tests/__init__.py puts it on the path: then every process of a test run, ranks and
commands included, takes this machine for one that has bf16, or for one that has not."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

NATIVE = {"fp32": False, "bf16": True}[os.environ["GAN_DIST_TEST_PRECISION"]]


class Forced:
    """Finds gan_dist.training.runner as everyone does, and answers for it which precision is native."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "gan_dist.training.runner" or not (spec := PathFinder.find_spec(name, path)) or not spec.loader:
            return None
        load = spec.loader.exec_module

        def load_and_answer(module: ModuleType) -> None:
            load(module)
            assert callable(module.native_bf16)
            module.__dict__["native_bf16"] = lambda device: NATIVE

        spec.loader.exec_module = load_and_answer  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Forced)

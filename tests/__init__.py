"""What every process of a test run has in its environment: set before torch is imported, handed on to what is started.

GAN_DIST_TEST_PRECISION=fp32|bf16   what `train.precision: auto` becomes, whatever this machine has
GAN_DIST_TEST_THREADS=N             torch's threads in every process, 1 unless set
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

THREADS = int(os.environ.get("GAN_DIST_TEST_THREADS") or 1)
PRECISION = os.environ.get("GAN_DIST_TEST_PRECISION")

# Containers often forbid Python to keep what it compiles; then every process compiles torch anew, which takes 10 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Triton warns at its first kernel where this is not set, and a warning fails a test; 1 is what it takes then.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

if PRECISION:
    _force = str(Path(__file__).parent / "helpers" / "force")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_force, os.environ.get("PYTHONPATH"))))
    sys.path.insert(0, _force)
    sys.modules.pop("sitecustomize", None)
    importlib.import_module("sitecustomize")

"""Parts of a measurement that end in every way, as processes: python -m tests.helpers.parts COMMAND --only NAME ..."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    words = dict(zip(sys.argv[2::1], sys.argv[3::1], strict=False))
    match words["--only"]:
        case "fails":
            raise SystemExit("a test of failure")
        case "hangs":
            Path(words["--work"], "part.json").write_text('{"figure": 1}')
            time.sleep(600)
        case "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
    Path(words["--work"], "part.json").write_text('{"figure": 1}')

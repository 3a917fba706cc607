"""What a process does at its end."""

from __future__ import annotations

import subprocess
import sys


def test_a_process_that_is_left_uncollected_freezes_its_objects_last() -> None:
    ask = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0)); "
    leave = "from gan_dist.utils.system import leave_uncollected; leave_uncollected()"
    for code, answer in ((ask + leave, "True"), (ask, "False")):
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert ended.stdout.strip() == answer

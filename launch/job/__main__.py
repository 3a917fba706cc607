"""A step of this folder for slurm/lib.sh, from a checkout or from the archive of one that a submission holds.

    python3 -I CODE/launch/job NAME ARGUMENTS...       CODE may be code.zip; Python finds what is in it

These lines must run on any Python 3.
"""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(sys.path[0]).parents[1])
runpy.run_module("launch.job." + sys.argv.pop(1), run_name="__main__", alter_sys=True)

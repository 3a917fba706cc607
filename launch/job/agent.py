"""torchrun's agent without its traceback: a rank that refuses its input has already said why.

python -m launch.job.agent [torchrun's options] -m MODULE WORDS...
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from gan_dist.utils.errors import EXIT_STOPPED, EXIT_USAGE


def main() -> None:
    """Runs torchrun with the arguments of this process; exits with 1 when a rank failed, and prints which one."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun()
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode not in (EXIT_USAGE, EXIT_STOPPED):
            print(error, file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

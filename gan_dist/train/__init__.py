"""The synchronised game: update, recovery, loop. Called, it trains: see gan_dist.train.trainer.train.

`gan_dist.train` names this package as well as the library's function: whichever a program has met first, calling it
trains.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from gan_dist.train.trainer import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Room

"""Whether a node's interpreter, in its container, can run a rank: run there before the ranks are, in a second.

Exits with 1 after a last line that says what is wrong. The first lines must run on any Python 3.
"""

import os
import sys


def fault():
    # type: () -> str
    """Returns why no rank could run here, or nothing."""
    missing = [name for name in ("GAN_DIST_ATTEMPT", "PYTHONPATH", "SLURM_PROCID") if name not in os.environ]
    if missing:
        return "the environment does not reach Python (%s is not set); leave out --cleanenv, env -i and the like" % (
            ", ".join(missing)
        )
    attempt = os.environ["GAN_DIST_ATTEMPT"]
    if not os.access(attempt, os.W_OK):
        return "the container does not show %s to write in; bind it (apptainer's -B, docker's -v)" % attempt
    if sys.version_info < (3, 11):
        return "expected Python 3.11 or newer, found %d.%d" % sys.version_info[:2]
    import importlib.util

    packages = ("torch", "torchvision", "webdataset", "numpy", "PIL", "yaml", "pydantic", "submitit", "tensorboard")
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        return "%s has no module %s" % (sys.executable, ", ".join(absent))
    try:
        import launch.job.rank  # noqa: F401
    except Exception as error:
        return "%s: %s" % (type(error).__name__, error)
    return ""


if __name__ == "__main__":
    words = fault()
    if words:
        print(words)
    sys.exit(bool(words))

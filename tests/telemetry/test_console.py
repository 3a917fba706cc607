"""The console as people meet it: a narrow terminal, a wide one, a log, quiet, verbose, and with trouble."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from gan_dist.telemetry.console import RunConsole, line_of

VALUES = {
    "progress/epoch": 1.5,
    "throughput/images_per_second": 236.04,
    "loss/discriminator": 1.25,
    "loss/generator": 0.75,
    "probability/real": 0.6,
    "probability/fake": 0.3,
    "gradient_norm/generator": 2.0,
    "throughput/data_wait_fraction": 0.0,
    "updates/skipped": 0.0,
}


def plain(stream: io.StringIO) -> list[str]:
    """Returns what a person saw at the end: lines without control sequences."""
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).rstrip() for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("width", [30, 60, 200])
def test_a_terminal_of_any_width(width: int) -> None:
    stream = io.StringIO()
    console = RunConsole("a [run]", 0, 24210, Console(file=stream, force_terminal=True, width=width))
    console.progress(10)
    console.scalars(200, VALUES)
    console.sample(Path("runs/a/samples/step-00000200.png"))
    console.warn("the disk [is] full")
    console.close()
    lines = plain(stream)
    assert all(len(line) <= width for line in lines if "WARNING" not in line), [len(line) for line in lines]
    text = re.sub(r"[\s│]", "", "".join(lines))
    assert "a[run]" in text and "step200/24210" in text
    assert "loss_d1.250" in text and "images/s236.0" in text and "step-00000200.png" in text
    assert "WARNING:thedisk[is]full" in text and "!thedisk[is]full" in text
    assert "skipped" not in text, "no word of what did not happen"


def test_a_log_has_a_line_an_interval_that_greps() -> None:
    stream = io.StringIO()
    console = RunConsole("run", 0, 1000, Console(file=stream, width=60))
    for step in (50, 100):
        console.progress(step)
        console.scalars(step, {**VALUES, "updates/skipped": 2.0})
    console.warn("careful")
    console.sample(Path("x.png"))
    console.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and "\x1b" not in stream.getvalue()
    words = dict(word.split("=") for word in lines[1].split())
    assert words["step"] == "100/1000" and words["loss_d"] == "1.250" and words["skipped"] == "2" and "left" in words
    assert lines[2] == "WARNING: careful"


def test_quiet_and_verbose() -> None:
    quiet, verbose = io.StringIO(), io.StringIO()
    for stream, verbosity in ((quiet, -1), (verbose, 1)):
        console = RunConsole("run", 0, 10, Console(file=stream, width=60), verbosity)
        console.log("hello")
        console.scalars(5, VALUES)
        console.warn("careful")
        console.close()
    assert quiet.getvalue() == "WARNING: careful\n"
    assert "gradient_norm/generator=2" in verbose.getvalue() and "hello" in verbose.getvalue()


def test_a_dumb_terminal_is_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = io.StringIO()
    console = RunConsole("run", 0, 10, Console(file=stream, force_terminal=True, width=60))
    console.scalars(5, VALUES)
    console.close()
    assert plain(stream)[0].startswith("step=5/10 epoch=1.50")


def test_missing_and_lost_values_are_left_out() -> None:
    assert line_of(5, 10, {"loss/discriminator": None, "probability/real": 0.5}) == "step=5/10 d_real=0.500"
    assert line_of(5, 10, {}, 3700) == "step=5/10 left=1h01m"

"""Progress: a line for each tenth in a log, a bar on a terminal, nothing when it is not shown."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gan_dist.utils.progress import progress


def lines(in_bytes: bool, shown: bool = True, terminal: bool = False) -> str:
    out = io.StringIO()
    with progress(Console(file=out, force_terminal=terminal, width=80), shown=shown, in_bytes=in_bytes) as show:
        for done in range(41):
            show("reading", done * 10**6, 40 * 10**6)
    return out.getvalue()


def test_a_log_gets_a_line_for_each_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = lines(in_bytes=False).splitlines()
    assert (
        len(counted) == 11 and counted[0] == "reading: 0 of 40000000" and counted[-1] == "reading: 40000000 of 40000000"
    )
    assert lines(in_bytes=True) == "", "sooner than QUIET_S"
    monkeypatch.setattr("gan_dist.utils.progress.QUIET_S", -1.0)
    megabytes = lines(in_bytes=True).splitlines()
    assert len(megabytes) == 10 and megabytes[0] == "reading: 4 of 40 MB"
    assert megabytes[-1] == "reading: 40 of 40 MB in 0 s"


def test_a_terminal_gets_a_bar_and_silence_is_possible() -> None:
    assert "reading" in lines(in_bytes=True, terminal=True) and "\x1b" in lines(in_bytes=False, terminal=True)
    assert lines(in_bytes=False, shown=False) == ""


def test_work_of_unknown_size_is_counted_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("gan_dist.utils.progress.time.monotonic", lambda: now[0])
    out = io.StringIO()
    with progress(Console(file=out, highlight=False)) as show:
        for second in range(20):
            now[0] = float(second)
            show("listing", 100 * second, 0)
    assert out.getvalue().splitlines() == [f"listing: {n} so far" for n in (100, 200, 400, 800, 1600)]

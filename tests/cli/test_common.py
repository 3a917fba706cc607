"""What the commands share."""

from __future__ import annotations

import pytest

from gan_dist.cli.common import print_table


def test_a_table_in_a_log_is_neither_cut_nor_wrapped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_table(["step", *(f"figure_{i}" for i in range(40))], [["1", *["0.5"] * 40], ["200", *["[b]"] * 40]])
    head, *rows = capsys.readouterr().out.splitlines()
    assert len(head.split()) == 41 and [row.split() for row in rows] == [["1", *["0.5"] * 40], ["200", *["[b]"] * 40]]
    assert len({len(line) for line in (head, *rows)}) == 1 and "\x1b" not in head

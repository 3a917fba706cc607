"""A command as an element of a job array: which share it does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gan_dist.utils.errors import UserError
from launch.job import command
from launch.job.command import options_of_element
from launch.job.rank import ATTEMPT


def element(number: int, count: int, first: int, last: int, step: int) -> dict[str, str]:
    names = zip(("ID", "COUNT", "MIN", "MAX", "STEP"), (number, count, first, last, step), strict=True)
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names}


def test_an_array_with_a_step_is_shared_out_evenly() -> None:
    shares = [options_of_element(["prepare"], element(number, 4, 1, 10, 3)) for number in (1, 4, 7, 10)]
    assert shares == [["--task", f"{part}/4"] for part in range(4)]


@pytest.mark.parametrize("env", [element(1, 3, 1, 7, 1), element(3, 3, 0, 4, 2)])
def test_an_array_with_gaps_is_refused_in_one_line(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        UserError, match=r"^expected an array without gaps, found 3 elements from \d to \d; submit it with"
    ):
        options_of_element(["prepare"], env)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv(ATTEMPT, str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["command", "prepare", "a", "b"])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    words = (tmp_path / "failed-0").read_text().split("\t")
    assert words[1:3] == ["2", "error"] and "--array=0-2" in words[5]

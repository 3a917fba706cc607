"""What RUN means, and which names runs may have."""

from __future__ import annotations

from pathlib import Path

import pytest

from gan_dist.runs.naming import choose_run_dir, run_and_step, run_path
from gan_dist.utils.errors import UserError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GAN_DIST_RUNS", str(tmp_path / "all runs"))


def test_a_run_is_a_path_or_a_name_and_a_file_of_weights_needs_no_slash(tmp_path: Path) -> None:
    home = tmp_path / "all runs"
    assert run_path("art") == home / "art"  # nothing is there yet
    (tmp_path / "art").write_bytes(b"weights")
    assert run_path("art") == run_path("./art") == tmp_path / "art"
    (home / "art").mkdir(parents=True)
    assert run_path("art") == home / "art"  # a run of that name comes before a file that happens to lie here
    assert run_path("art", str(tmp_path / "other")) == tmp_path / "art"
    (tmp_path / "local").mkdir()
    assert run_path("local") == tmp_path / "local"


def test_names_are_plain() -> None:
    assert choose_run_dir("configs/a.yaml", None, None).name == "a"
    for name in ("monet-2", "x", "Claude Monet", "v1.2", "épreuve"):
        assert choose_run_dir("a.yaml", name, None).name == name
    for name in ("", ".", "..", "x/../../y", "a/b", "-x", " ", "x ", "a\nb", ".hidden", "n" * 201, "é" * 101):
        with pytest.raises(UserError, match=r"--name: expected a plain name such as monet-2"):
            choose_run_dir("a.yaml", name, None)
    with pytest.raises(UserError, match="give one of them"):
        choose_run_dir("a.yaml", "", "there")


def test_runs_lie_in_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="s3://b/x: expected a directory, found an address"):
        choose_run_dir("a.yaml", None, "s3://b/x")
    with pytest.raises(UserError, match="http://there/x: expected a directory"):
        run_path("http://there/x")
    monkeypatch.setenv("GAN_DIST_RUNS", "gs://bucket")
    with pytest.raises(UserError, match="gs://bucket: expected a directory"):
        choose_run_dir("a.yaml", "x", None)


def test_a_step_may_be_named_with_a_run(tmp_path: Path) -> None:
    home = tmp_path / "all runs"
    assert run_and_step("a@12") == (home / "a", 12) and run_and_step("a") == (home / "a", None)
    assert run_and_step("a@12", str(tmp_path)) == (tmp_path / "a", 12)
    assert run_and_step("/me@home/a") == (Path("/me@home/a"), None)
    assert run_and_step("/me@home/a@0") == (Path("/me@home/a"), 0)
    for text in ("", "@", "@3", "a@", "a@x", "a@-1", "a@²"):
        with pytest.raises(UserError, match="--from: expected RUN or RUN@STEP, found"):
            run_and_step(text)

"""Several seeds as one array: what is queued, and which element is whose."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from gan_dist.config.schema import load_config, to_yaml
from gan_dist.utils.errors import UserError
from launch import slurm
from launch.cli import cancel, status_command, submit
from launch.options import load_cluster
from launch.seeds import read_seeds, seed_batch, submit_seeds
from launch.submit import check_config
from tests.launch.test_submit import Slurm, config, fake  # noqa: F401 (fixtures)


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-4", [0, 1, 2, 3, 4]), ("7", [7]), ("3,7, 10-11", [3, 7, 10, 11]), ("2,2-3", [2, 3])]
)
def test_lists_of_seeds(text: str, seeds: list[int]) -> None:
    assert read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "4-2", "a", "-1", "0-99999", "1,,2", "1-"])
def test_what_is_no_list_of_seeds_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^--seeds: expected numbers and ranges such as 0-4 or 3,7, found "):
        read_seeds(text)


def test_an_element_finds_its_run_by_its_number_however_paths_are_written(tmp_path: Path) -> None:
    base = tmp_path / "it's 100% art"
    text = seed_batch(base, "20261122-000000-abcdef", [3, 7], load_cluster(None))
    assert "#SBATCH --array=3,7\n" in text and "-seed-%a/logs/%A_%a-batch.log" in text and "100%% art" in text
    line = next(line for line in text.splitlines() if line.startswith("gan_dist_begin"))
    words = ["bash", "-c", f"gan_dist_begin() {{ printf '%s\\n' \"$@\"; }}\n{line}"]
    env = {**os.environ, "SLURM_ARRAY_TASK_ID": "7"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    run = str(base.with_name(f"{base.name}-seed-7"))
    assert done.stdout.splitlines() == [run, f"{run}/launch/20261122-000000-abcdef"]
    assert "#SBATCH --array=0-2\n" in seed_batch(base, "x", [0, 1, 2], load_cluster(None))


@pytest.mark.usefixtures("fake")
def test_each_seed_is_a_run_of_its_own_and_an_element_of_one_job(
    fake: Slurm,  # noqa: F811
    config: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = submit_seeds(config, [], load_cluster(None), tmp_path / "runs" / "art", [3, 7])
    assert [(run.name, each.job) for run, each in made] == [("art-seed-3", "71_3"), ("art-seed-7", "71_7")]
    assert len(fake.calls("sbatch")) == 1
    for (run, each), seed in zip(made, (3, 7), strict=True):
        folder = run / "launch" / each.id
        assert f"seed: {seed}\n" in (folder / "config.yaml").read_text()
        assert (folder / f"{each.job}_submitted.pkl").exists() and (folder / "code.zip").exists()
        assert json.loads((folder / "job.json").read_text())["words"][-1] == f"seed={seed}"
    code = [run / "launch" / each.id / "code.zip" for run, each in made]
    assert code[0].stat().st_ino == code[1].stat().st_ino  # written once
    fake.program("squeue", "echo '71_3|RUNNING|1:00|n1|(None)|N/A'; echo '71_7|PENDING|1:00||(Priority)|N/A'")
    status_command([str(run) for run, _ in made])
    output = capsys.readouterr().out
    assert "job 71_3 (train, 1 rank(s)): RUNNING on n1" in output and "job 71_7 (train, 1 rank(s)): PENDING" in output
    cancel(str(made[1][0]))
    assert fake.calls("scancel") == ["71_7"]
    with pytest.raises(UserError, match="art-seed-3 has job 71_3 already"):
        submit_seeds(config, [], load_cluster(None), tmp_path / "runs" / "art", [2, 3])
    assert not (tmp_path / "runs" / "art-seed-2").exists()


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("dry_run", [True, False])
def test_another_run_where_they_would_lie_without_a_seed_is_none_of_them(
    config: str,  # noqa: F811
    tmp_path: Path,
    dry_run: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tmp_path / "runs" / "art"
    base.mkdir(parents=True)
    (base / "config.yaml").write_text(to_yaml(load_config(config, ["optim.g_lr=1e-3"])))
    with pytest.raises(UserError, match="holds a run with another configuration"):
        check_config(config, [], load_cluster(None), base)
    for words, said in (({"from_run": "nowhere"}, "nowhere"), ({"words": ["seed=5"]}, "--seeds and seed=N say")):
        with pytest.raises(UserError, match=said):
            submit(config, **({"words": None} | words), run_dir=str(base), seeds="3,7", dry_run=dry_run)
    submit(config, None, run_dir=str(base), seeds="3,7", unchecked=True, dry_run=dry_run)
    assert ("--array=3,7" if dry_run else "job 71_7: run") in capsys.readouterr().out


@pytest.mark.usefixtures("fake")
def test_all_seeds_are_queued_or_none(fake: Slurm, config: str, tmp_path: Path) -> None:  # noqa: F811
    fake.program("sbatch", "echo no such partition >&2; exit 1")
    with pytest.raises(UserError, match="no such partition"):
        submit_seeds(config, [], load_cluster(None), tmp_path / "runs" / "art", [0, 1])
    assert not list((tmp_path / "runs").iterdir())
    assert slurm.Job("71_10").order > slurm.Job("71_9").order

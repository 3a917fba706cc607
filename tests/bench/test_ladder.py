"""The ladder climbs, stops, goes on, and leaves nothing out: two tiny recipes, trained and measured for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from gan_dist.data.prepare.prepare import prepare
from gan_dist.data.prepare.synthetic import paint_folder
from gan_dist.utils.errors import GanDistError
from tests.bench.ladder import best_row, main, nearest_row, read_lines
from tests.helpers.training import small

pytestmark = pytest.mark.chaos


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A ladder's home with three datasets of 120 paintings at 32x32."""
    for seed, name in enumerate(("train", "select", "report")):
        paint_folder(tmp_path / name / "paintings", 120, seed=seed)
        prepare([tmp_path / name / "paintings"], tmp_path / name / "shards", resolution=32, shard_samples=120)
    base = small(tmp_path / "train" / "shards")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base if isinstance(base, dict) else base.to_dict()))
    recipes = {
        "base": str(tmp_path / "base.yaml"),
        "common": ["train.threads=1", "evaluate.samples=100"],
        "recipes": {"thesis": [], "nearest": ["model.upsample=nearest", "data.x_flip=true", "optim.d_steps=2"]},
    }
    (tmp_path / "recipes.yaml").write_text(yaml.safe_dump(recipes))
    return tmp_path


@pytest.mark.timeout(300)
def test_two_recipes_from_training_to_the_page(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ladder(what: str, *words: str) -> str:
        common = ["--recipes", str(home / "recipes.yaml"), *words]
        monkeypatch.setattr("sys.argv", ["ladder", what, str(home), *common])
        main()
        return capsys.readouterr().out

    sets = [
        word
        for name, option in (("train", "data"), ("select", "select"), ("report", "report"))
        for word in (f"--{option}", str(home / name / "shards"))
    ]
    ladder("run", *sets, "--images", "64", "--points", "2", "--seeds", "0", "--only", "thesis")
    ladder("run", *sets, "--images", "64", "--points", "2", "--seeds", "0")
    lines = read_lines(home / "ladder.jsonl")
    assert [line["recipe"] for line in lines] == ["thesis", "nearest"]  # what was done is not done again
    for line in lines:
        assert line["report"][-1]["images_seen"] == 64 and len(line["report"]) >= 2
        assert line["select"] != line["report"]
    ladder("cost", "--rounds", "1")
    table = ladder("table")
    assert "| thesis | 1 | 1.00 |" in table and "| nearest | 1 |" in table
    ladder("run", *sets, "--images", "32", "--points", "2", "--seeds", "0", "--only", "thesis")
    with (home / "ladder.jsonl").open("a") as file:  # as two ladders in one home would leave it
        file.write((home / "ladder.jsonl").read_text())
    table = ladder("table")
    assert [line.split("|")[1:3] for line in table.splitlines()[2:]] == [
        [" thesis, 64 images ", " 1 "],
        [" nearest, 64 images ", " 1 "],
        [" thesis, 32 images ", " 1 "],
    ]
    ladder("page", "--out", str(home / "page.html"))
    assert (home / "page.html").read_text().count("data:image/png;base64,") >= 6


def test_what_cannot_be_run_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ladder", "run", str(home), "--recipes", str(home / "recipes.yaml")]
    monkeypatch.setattr("sys.argv", [*words, "--only", "nope"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "no recipe 'nope'" in capsys.readouterr().err
    sets = [word for name in ("data", "select", "report") for word in (f"--{name}", str(home / "nowhere"))]
    monkeypatch.setattr("sys.argv", [*words, *sets, "--images", "16", "--seeds", "0"])
    with pytest.raises((SystemExit, GanDistError), match="nowhere"):
        main()


def test_checkpoints_are_chosen_by_one_half_and_told_by_the_other() -> None:
    rows = [
        {"step": step, "images_seen": 10 * step, "swd": swd} for step, swd in ((0, 1.0), (1, 5.0), (2, 4.0), (3, 6.0))
    ]
    line = {"select": rows, "report": [{**row, "swd": 100 - row["swd"]} for row in rows]}
    assert best_row(line)["swd"] == 96 and best_row(line, limit=10)["swd"] == 95
    assert nearest_row(line, 25)["step"] == 2


def test_what_a_recipe_costs_is_told_by_image(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = yaml.safe_load((home / "recipes.yaml").read_text())
    recipes["recipes"]["small"] = ["train.global_batch=4"]
    (home / "recipes.yaml").write_text(yaml.safe_dump(recipes))
    batch = yaml.safe_load((home / "base.yaml").read_text())["train"]["global_batch"]
    seconds = iter(range(1000))
    monkeypatch.setattr("tests.bench.ladder.a_step", lambda *words: lambda: None)
    monkeypatch.setattr("tests.bench.ladder.time.process_time", lambda: next(seconds))  # each step takes one
    monkeypatch.setattr("sys.argv", ["ladder", "cost", str(home), "--recipes", str(home / "recipes.yaml")])
    main()
    costs = json.loads((home / "cost.json").read_text())
    assert costs == {"thesis": 1 / batch, "nearest": 1 / (2 * batch), "small": 1 / 4}  # nearest has two d_steps

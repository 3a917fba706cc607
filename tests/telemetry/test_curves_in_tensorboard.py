"""TensorBoard itself, with both of its loaders and in a browser, on a run that was killed and continued three times."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gan_dist.data.dataset import open_dataset
from gan_dist.runs.metrics_file import read_metrics
from gan_dist.telemetry.telemetry import put_in_order
from tests.helpers.browser import browser
from tests.helpers.ranks import free_port
from tests.helpers.runs import Game

TOTAL = 12
KILLS = ((0, 5), (3, 8), (3, 7), (6, 12))
"""(resumed from, killed or ended after): twice from the same checkpoint, and always with later steps on the disk."""


@pytest.fixture(scope="module")
def killed_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed three times and ended: its steps were played up to twice."""
    game = Game(tmp_path_factory.mktemp("runs") / "killed", open_dataset(dataset), TOTAL)
    for number, (start, stop) in enumerate(KILLS):
        game.play(start, stop, last_word="end" if number == len(KILLS) - 1 else None)
    return game.run_dir


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.loads(answer.read())


@contextmanager
def tensorboard(
    directory: Path, fast: bool, folder: str = "tensorboard", run: str = ".", last: int = TOTAL
) -> Iterator[str]:
    """Yields the address of a TensorBoard on a folder of `directory`, once it has read `run` up to its last step."""
    port = free_port()
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "tensorboard.main", "--logdir", str(directory / folder), "--port", str(port)),
            *("--load_fast", "true" if fast else "false", "--host", "127.0.0.1", "--reload_interval", "1"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        limit = time.monotonic() + 80
        while True:
            try:
                tags = get(f"{address}/data/plugin/scalars/tags")
                if (
                    run in tags
                    and "progress/epoch" in tags[run]
                    and points(address, "progress/epoch", run=run)[-1][1] == last
                ):
                    break
            except (OSError, ValueError, IndexError):
                pass
            assert time.monotonic() < limit and server.poll() is None, "TensorBoard did not come up"
            time.sleep(0.2)
        yield address
    finally:
        server.kill()
        server.wait()


def points(address: str, tag: str, plugin: str = "scalars", run: str = ".") -> Any:
    """Returns what TensorBoard's own page asks for when it draws a tag."""
    words = urllib.parse.urlencode({"run": run, "tag": tag})
    return get(f"{address}/data/plugin/{plugin}/{plugin}?{words}")


def test_every_tags_steps_increase_in_the_reader(killed_run: Path) -> None:
    reader = EventAccumulator(str(killed_run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    reader.Reload()
    tags = reader.Tags()
    steps = {tag: [event.step for event in reader.Scalars(tag)] for tag in tags["scalars"]}
    steps |= {tag: [event.step for event in reader.Images(tag)] for tag in tags["images"]}
    steps |= {tag: [event.step for event in reader.Tensors(tag)] for tag in tags["tensors"]}
    assert {tag: found for tag, found in steps.items() if found != sorted(set(found))} == {}
    assert steps["loss/generator"] == steps["value/equilibrium"] == list(range(1, TOTAL + 1))
    assert steps["samples/fixed_latents"] == steps["samples/interpolation"] == [0, 3, 6, 9, 12]
    assert steps["samples/real"] == steps["dataset/contact_sheet"] == [0]
    # Texts of the machine and the history come with every start, at the first step that is new.
    assert steps["environment/text_summary"] == [0, 4, 5, 7] == steps["config/text_summary"]
    assert steps["history/text_summary"] == [1, 4, 5, 7, 12]
    history = reader.Tensors("history/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert history.count("| start |") == 4 and history.count("| end |") == 1
    assert "custom_scalars__config__" in tags["tensors"]
    assert [line["step"] for line in read_metrics(killed_run / "metrics.jsonl") if "event" not in line] == list(
        range(1, TOTAL + 1)
    )


@pytest.mark.parametrize("fast", [True, False])
def test_both_loaders_serve_clean_curves_to_the_page(killed_run: Path, fast: bool) -> None:
    with tensorboard(killed_run, fast) as address:
        (tags,) = get(f"{address}/data/plugin/scalars/tags").values()
        for tag in tags:
            assert [point[1] for point in points(address, tag)] == list(range(1, TOTAL + 1)), tag
        (pictures,) = get(f"{address}/data/plugin/images/tags").values()
        assert set(pictures) >= {"samples/fixed_latents", "samples/interpolation", "samples/real"}
        steps = [picture["step"] for picture in points(address, "samples/fixed_latents", "images")]
        assert steps == sorted(set(steps)) and steps[-1] == TOTAL


def test_the_pages_show_the_data(killed_run: Path, tmp_path: Path) -> None:
    with tensorboard(killed_run, True) as address, browser() as page:
        page.open(f"{address}/#timeseries", width=1400, height=1000)
        page.wait_for(r"document.body.innerText.replace(/\s+/g, '').includes('gradient_norm/discriminator')", 60)
        page.screenshot(tmp_path / "scalars.png")
        page.open(f"{address}/?x=1#images", width=1400, height=1000)
        deep = """(() => { const found = []; const walk = (root) => { for (const e of root.querySelectorAll('*')) {
            if (e.tagName === 'IMG' && e.naturalWidth > 60) found.push(e.naturalWidth);
            if (e.shadowRoot) walk(e.shadowRoot); } }; walk(document); return found; })()"""
        assert page.wait_for(f"{deep}.length >= 2 && {deep}", 60)
        page.screenshot(tmp_path / "images.png")
        page.open(f"{address}/?x=2#custom_scalars", width=1400, height=1000)
        text = """(() => { let all = ''; const walk = (root) => { all += root.textContent; for (const e of
            root.querySelectorAll('*')) if (e.shadowRoot) walk(e.shadowRoot); }; walk(document); return all; })()"""
        page.wait_for(f"{text}.includes('equilibrium -log 4') && {text}.includes('Update-to-weight ratios')", 60)
        page.screenshot(tmp_path / "custom.png")


def test_a_restart_within_the_second_or_with_a_clock_behind_sorts_behind(tmp_path: Path) -> None:
    ahead = int(time.time()) + 900
    for number, stamp in enumerate((ahead - 5, ahead, ahead)):
        (tmp_path / f"events.out.tfevents.{stamp:010d}.host.1.{number}").write_text(str(number))
    assert put_in_order(tmp_path) == 3
    files = sorted(tmp_path.iterdir())
    assert [file.read_text() for file in files] == ["0", "1", "2"]
    assert all(int(file.name.split(".")[3]) < time.time() for file in files)
    assert put_in_order(tmp_path) == 3 and sorted(tmp_path.iterdir()) == files

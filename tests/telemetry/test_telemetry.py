"""What a run tells, read back by TensorBoard's own reader and line by line."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from gan_dist.runs.metrics_file import TEXTS, read_metrics
from gan_dist.telemetry.console import RunConsole, duration
from gan_dist.telemetry.telemetry import Telemetry
from gan_dist.training.trainer import train
from tests.helpers.training import small

CPU_TAGS = {
    *("loss/discriminator", "loss/generator", "probability/real", "probability/fake", "probability/fake_after_update"),
    *("value/minimax", "value/jsd_lower_bound", "gradient_norm/discriminator", "gradient_norm/generator"),
    *("throughput/images_per_second", "throughput/data_wait_fraction", "progress/epoch"),
}


def board(run: Path) -> EventAccumulator:
    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    reader.Reload()
    return reader


def point(step: int) -> dict[str, float]:
    return {"loss/discriminator": float(step)}


def logged(run: Path, resumed: int, steps: range, **more: bool) -> Telemetry:
    telemetry = Telemetry(run, active=True, step=resumed, total_steps=100, console=False, **more)
    for step in steps:
        telemetry.scalars(step, 10 * step, point(step))
    return telemetry


def test_tensorboard_finds_every_tag_of_a_real_run(dataset: Path, tmp_path: Path) -> None:
    train(small(dataset), run_dir=tmp_path / "run", max_steps=8, console=False)
    reader = board(tmp_path / "run")
    tags = reader.Tags()
    assert set(tags["scalars"]) >= CPU_TAGS
    assert {"samples/fixed_latents", "samples/real"} <= set(tags["images"])
    assert {"config/text_summary", "environment/text_summary", "dataset/text_summary"} <= set(tags["tensors"])
    assert [event.step for event in reader.Scalars("loss/generator")] == [2, 4, 6, 8]
    assert [event.step for event in reader.Images("samples/fixed_latents")] == [0, 4, 8]
    for event in reader.Scalars("value/jsd_lower_bound"):
        value = next(e.value for e in reader.Scalars("value/minimax") if e.step == event.step)
        assert event.value == pytest.approx((value + math.log(4)) / 2, abs=1e-6)


def test_a_resumed_run_draws_each_step_once(tmp_path: Path) -> None:
    logged(tmp_path, 0, range(1, 8)).close()
    killed = logged(tmp_path, 4, range(5, 10))
    killed.flush()  # and never closed: the process was killed
    logged(tmp_path, 6, range(7, 12)).close()
    assert [event.step for event in board(tmp_path).Scalars("loss/discriminator")] == list(range(1, 12))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 12))
    killed.close()


def test_events_stay_and_torn_lines_go(tmp_path: Path) -> None:
    telemetry = logged(tmp_path, 0, range(1, 4))
    telemetry.event("stop", 3, reason="SIGTERM")
    telemetry.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss/disc')
    logged(tmp_path, 2, range(3, 5)).close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line.get("event") != TEXTS]
    assert [(line["step"], line.get("event")) for line in lines] == [
        (1, None),
        (2, None),
        (3, "stop"),
        (3, None),
        (4, None),
    ]
    assert lines[2]["reason"] == "SIGTERM" and lines[2]["time"] > 1e9


def test_flushed_is_readable_by_others(tmp_path: Path) -> None:
    telemetry = logged(tmp_path, 0, range(1, 3))
    telemetry.image("samples/real", 1, torch.zeros(3, 8, 8, dtype=torch.uint8))
    telemetry.flush()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert len(board(tmp_path).Scalars("loss/discriminator")) == 2
    telemetry.close()


def test_an_event_files_checksums_are_tensorboards_and_take_no_python(tmp_path: Path) -> None:
    """Its own would hold Python's lock for a tenth of a second a picture, while a GPU waits for the next step."""
    telemetry = Telemetry(tmp_path, active=True, step=0, total_steps=9, console=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pywrap_tensorflow, "crc_update", None)
        telemetry.image("samples/real", 0, torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8))
        telemetry.close()
    for data in (b"", b"123456789", bytes(range(256)) * 9):
        slow = pywrap_tensorflow.crc_finalize(pywrap_tensorflow.crc_update(pywrap_tensorflow.CRC_INIT, data))
        assert pywrap_tensorflow.crc32c(data) == slow
    assert "samples/real" in board(tmp_path).Tags()["images"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    silent = Telemetry(tmp_path, active=False, step=0, total_steps=9, console=False)
    silent.scalars(1, 1, point(1))
    silent.text("config", 0, "x")
    silent.event("start", 0)
    silent.progress(1)
    silent.flush()
    silent.close()
    assert list(tmp_path.iterdir()) == []


def test_a_log_gets_plain_lines_and_a_terminal_a_bar() -> None:
    values = {"throughput/images_per_second": 123.4, "loss/discriminator": 1.25, "progress/epoch": 0.5}
    plain = io.StringIO()
    console = RunConsole("run", 0, 100, Console(file=plain, force_terminal=False, soft_wrap=True, width=60))
    for step in (1, 2):
        console.progress(step)
    console.scalars(2, values)
    console.log("[/a] line with brackets")
    console.close()
    lines = plain.getvalue().splitlines()
    assert lines[0].startswith("step=2/100 epoch=0.50 images/s=123.4 loss_d=1.250")
    assert lines[1] == "[/a] line with brackets" and "\x1b" not in plain.getvalue()
    terminal = io.StringIO()
    console = RunConsole("run", 0, 100, Console(file=terminal, force_terminal=True, width=60))
    console.scalars(2, values)
    console.log("[/a] line with brackets")
    console.close()
    assert "2/100" in terminal.getvalue() and "[/a] line with brackets" in terminal.getvalue()


@pytest.mark.parametrize(("seconds", "words"), [(0, "0s"), (59.6, "1m00s"), (3700, "1h01m"), (200_000, "2d07h")])
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_numbers_that_are_none_stay_json(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, active=True, step=0, total_steps=9, console=False)
    telemetry.scalars(1, 1, {"loss/generator": math.nan, "loss/discriminator": math.inf})
    telemetry.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["loss/generator"] is None


def test_a_step_of_a_tag_stands_once(tmp_path: Path) -> None:
    telemetry = logged(tmp_path, 0, range(1, 3))
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    for _ in range(2):
        telemetry.image("samples/real", 2, picture, tmp_path / "real.png")
    telemetry.scalars(2, 20, point(2))
    telemetry.close()
    telemetry.close()
    reader = board(tmp_path)
    assert [event.step for event in reader.Images("samples/real")] == [2]
    assert [event.step for event in reader.Scalars("loss/discriminator")] == [1, 2]
    assert (tmp_path / "real.png").read_bytes() == reader.Images("samples/real")[0].encoded_image_string


def test_a_disk_that_refuses_pictures_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = Telemetry(tmp_path, active=True, step=0, total_steps=9)
    (tmp_path / "samples").write_text("a file where the folder should be")
    telemetry.image("samples/real", 1, torch.zeros(3, 8, 8, dtype=torch.uint8), tmp_path / "samples" / "a.png")
    telemetry.scalars(1, 1, point(1))
    telemetry.flush()
    telemetry.close()
    assert "WARNING: a file of the run cannot be written" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_warnings_become_history(tmp_path: Path) -> None:
    telemetry = logged(tmp_path, 0, range(1, 2))
    telemetry.warn("something odd", 1)
    telemetry.scalars(2, 20, point(2))
    telemetry.close()
    events = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line.get("event") == "warning"]
    assert [(event["step"], event["reason"]) for event in events] == [(1, "something odd")]
    (text,) = board(tmp_path).Tensors("history/text_summary")
    assert "something odd" in text.tensor_proto.string_val[0].decode()

"""Pictures of a run: queued on the device, and written when they have come from there, if they come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gan_dist.data.classes import Classes
from gan_dist.model.initialise import initialise
from gan_dist.model.networks import Generator
from gan_dist.runs.metrics_file import read_metrics
from gan_dist.sampling.generate import generate
from gan_dist.sampling.standing import Standing
from gan_dist.telemetry import gallery as galleries
from gan_dist.telemetry.gallery import Gallery
from gan_dist.telemetry.telemetry import Telemetry
from gan_dist.training.trainer import train
from gan_dist.utils import tensors
from gan_dist.utils.pictures import from_pil, grid
from gan_dist.utils.tensors import HostCopy
from tests.helpers.dispatch import fake_gpus
from tests.helpers.games import STYLES
from tests.helpers.training import assert_identical, small
from tests.telemetry.test_telemetry import board
from tests.training.test_runner import waiting_is_an_error

LATENT = 8
TAGS = ("samples/fixed_latents", "samples/interpolation", "samples/classes")


def _generator(classes: Classes = STYLES) -> Generator:
    network = Generator(32, LATENT, 4, classes=classes)
    initialise(network, 0.3, torch.Generator().manual_seed(0))
    return network


class _Event:
    """An event of the device, in a test's hands."""

    def __init__(self) -> None:
        self.over, self.error = False, ""

    def query(self) -> bool:
        if self.error:
            raise RuntimeError(self.error)
        return self.over


@pytest.fixture
def event(monkeypatch: pytest.MonkeyPatch) -> _Event:
    """What each copy to the host waits for."""
    event = _Event()
    monkeypatch.setattr(tensors, "record_event", lambda device: event)
    return event


def _telemetry(run: Path, **more: Any) -> Telemetry:
    run.mkdir(exist_ok=True)
    return Telemetry(run, active=True, step=0, total_steps=9, **more)


class _Crossings(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what reads on one device and writes on another, and whether the host goes on at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1:
            goes_on = func is torch.ops.aten.copy_.default and len(args) > 2 and args[2]
            self.seen.append((func._schema.name, bool(goes_on)))
        return out


def test_drawing_on_a_gpu_queues_a_copy_to_the_host_and_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: _Event
) -> None:
    sent: list[Any] = []
    telemetry: Any = type("", (), {"images": lambda self, *words: sent.append(words)})()
    crossings: Any = _Crossings()
    with fake_gpus(1, monkeypatch):
        network, twin = _generator().cuda(), _generator().cuda()
        standing = Standing(network, twin)
        gallery, latents = (
            Gallery(tmp_path, telemetry, standing.network, torch.randn(9, LATENT)),
            torch.randn(9, LATENT),
        )
        with crossings:
            standing.refresh()
            gallery.draw(4)
        assert crossings.seen == [("aten::copy_", True)]
        with crossings:  # which sees what waits
            generate(network, network.with_classes(latents.cuda(), torch.zeros(9, dtype=torch.int64)))
        assert len(crossings.seen) >= 3 and not any(goes_on for _, goes_on in crossings.seen[1:])
    ((step, copy, pictures),) = sent
    assert step == 4 and copy.host.device.type == "cpu" and copy.device.type == "cuda" and not copy.arrived
    assert tuple(each.tag for each in pictures) == TAGS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_grid_is_drawn_without_a_wait(tmp_path: Path) -> None:
    network, latents = _generator().cuda(), torch.randn(9, LATENT)
    telemetry = _telemetry(tmp_path, console=False)
    gallery = Gallery(tmp_path, telemetry, network, latents)
    gallery.draw(1)  # finds kernels and memory
    telemetry.flush()
    with waiting_is_an_error():
        gallery.draw(2)
    telemetry.close()
    expected = grid(generate(network, network.with_classes(latents, STYLES.draw(9, 0))))
    with Image.open(tmp_path / "samples" / "step-00000002.png") as picture:
        assert torch.equal(from_pil(picture), expected)


def test_pictures_are_written_when_they_have_come_and_are_the_same(tmp_path: Path, event: _Event) -> None:
    network, latents = _generator(), torch.randn(9, LATENT, generator=torch.Generator().manual_seed(1))
    for run, over in (("at once", True), ("later", False)):
        event.over = over
        telemetry = _telemetry(tmp_path / run, console=False)
        gallery = Gallery(tmp_path / run, telemetry, network, latents)
        gallery.draw(3)
        kept = [value.clone() for value in network.parameters()]
        with torch.no_grad():  # training goes on, and the picture stays that of its step
            torch._foreach_mul_(list(network.parameters()), 2)
        if not over:
            time.sleep(0.05)
            assert not (tmp_path / run / "samples").exists()
            threading.Timer(0.05, lambda: setattr(event, "over", True)).start()
        telemetry.flush()  # waits for it
        assert len(list((tmp_path / run / "samples").iterdir())) == 2
        telemetry.close()
        with torch.no_grad():
            torch._foreach_copy_(list(network.parameters()), kept)
    at_once, later = ({tag: board(tmp_path / run).Images(tag) for tag in TAGS} for run in ("at once", "later"))
    for tag in TAGS:
        (one,), (other,) = at_once[tag], later[tag]
        assert (one.step, one.encoded_image_string) == (3, other.encoded_image_string) and other.step == 3
    for name in ("step-00000003.png", "classes-00000003.png"):
        assert (tmp_path / "at once/samples" / name).read_bytes() == (tmp_path / "later/samples" / name).read_bytes()


class Clock:
    """In the place of telemetry's: a tenth of a second goes by from look to look."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.time = 0.0, time.time
        self.alarms: dict[float, Callable[[], object]] = {}
        patch.setattr("gan_dist.telemetry.telemetry.time", self)
        patch.setattr("gan_dist.telemetry.telemetry.LATER_S", 0.01)

    def monotonic(self) -> float:
        self.now += 0.1
        for when in [when for when in self.alarms if when <= self.now]:
            self.alarms.pop(when)()
        return self.now


@pytest.mark.parametrize("orderly", [True, False])
def test_a_device_that_hangs_holds_up_no_close(
    tmp_path: Path,
    event: _Event,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    orderly: bool,
) -> None:
    clock = Clock(monkeypatch)
    telemetry = _telemetry(tmp_path, timeout_s=2 if orderly else 1000)
    gallery = Gallery(tmp_path, telemetry, _generator(), torch.randn(4, LATENT))
    for step in (1, 2, 3):
        gallery.draw(step)
    telemetry.event("end", 3)
    closing = threading.Thread(target=telemetry.close, kwargs={"orderly": orderly}, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()
    assert clock.now < 3  # one whole wait, and no more
    why = "the device did not finish them within dist.timeout_s=2 s" if orderly else "the device hangs"
    lines = [f"the samples of step {step} are not drawn: {why}" for step in (1, 2, 3)]
    assert [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line] == [
        f"WARNING: {line}" for line in lines
    ]
    warned = [line["reason"] for line in read_metrics(tmp_path / "metrics.jsonl") if line.get("event") == "warning"]
    assert warned == lines
    assert not (tmp_path / "samples").exists()


def test_a_broken_device_is_a_line_and_what_comes_after_a_stall_is_drawn(
    tmp_path: Path, event: _Event, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    telemetry = _telemetry(tmp_path, timeout_s=2)
    gallery = Gallery(tmp_path, telemetry, _generator(), torch.randn(4, LATENT))
    event.error = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ..."
    gallery.draw(1)
    telemetry.flush()
    event.error = ""
    gallery.draw(2)
    telemetry.flush()
    event.over = True
    gallery.draw(3)
    telemetry.flush()
    event.over = False
    gallery.draw(4)  # which is waited for as long as the first
    clock.alarms[clock.now + 1] = lambda: setattr(event, "over", True)
    telemetry.close()
    out = capsys.readouterr().out
    assert "step 1 are not drawn: CUDA error: an illegal memory access was encountered\n" in out
    assert "step 2 are not drawn: the device did not" in out and "step 3" not in out
    assert [path.name for path in sorted((tmp_path / "samples").glob("step-*"))] == [
        "step-00000003.png",
        "step-00000004.png",
    ]


def test_the_thread_takes_the_pictures_gpu_before_it_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(f"{device}"))
    copy: Any = HostCopy(torch.zeros(1))
    copy.device, copy._event = torch.device("cuda", 1), type("", (), {"query": lambda self: bool(calls)})()
    telemetry = _telemetry(tmp_path, console=False, timeout_s=0.1)
    telemetry.images(1, copy, [])
    telemetry.close()
    assert calls == ["cuda:1"]
    assert not any(line.get("event") == "warning" for line in read_metrics(tmp_path / "metrics.jsonl"))


def test_a_gpu_that_cannot_be_taken_any_more_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.cuda, "set_device", broken)
    copy: Any = HostCopy(torch.zeros(1))
    copy.device = torch.device("cuda", 1)
    telemetry = _telemetry(tmp_path, console=False)
    telemetry.images(1, copy, [])
    telemetry.close()
    (warning,) = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line.get("event") == "warning"]
    assert warning["reason"] == "the samples of step 1 are not drawn: CUDA error: unspecified launch failure"


def test_a_run_whose_pictures_never_come_ends_with_the_bits_of_one_that_has_them(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["log.samples_every=2", "train.ema_half_life_images=64", "train.ema_statistics=standing"]
    train(small(dataset), words, run_dir=tmp_path / "drawn", max_steps=4, console=False)
    monkeypatch.setattr(galleries, "HostCopy", type("", (HostCopy,), {"arrived": False}))
    train(small(dataset), [*words, "dist.timeout_s=0.2"], run_dir=tmp_path / "hangs", max_steps=4, console=False)
    assert_identical(tmp_path / "drawn", tmp_path / "hangs")
    assert [path.name for path in (tmp_path / "hangs/samples").iterdir()] == ["real.png"]
    warned = [line for line in read_metrics(tmp_path / "hangs/metrics.jsonl") if line.get("event") == "warning"]
    assert [line["step"] for line in warned] == [0, 2, 4]

"""CUDA's objects played on a CPU: streams that do nothing, and a graph that replays a step by calling it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch


class FakeStream:
    def wait_stream(self, other: object) -> None:
        """Does nothing."""


class FakeGraph:
    """A graph that notes what is done with it in `calls`."""

    calls: list[str]

    def __init__(self) -> None:
        self.calls = []

    def replay(self) -> None:
        self.calls.append("replay")

    def reset(self) -> None:
        self.calls.append("reset")


@contextmanager
def _recording(graph: Any, **options: Any) -> Iterator[None]:
    yield


def play_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes what a capture needs of torch.cuda work without a device; returns the list that notes synchronisations."""
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda *words: FakeStream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *words: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *words: waits.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", _recording)
    return waits

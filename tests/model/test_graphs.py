"""Graphs for which there is no memory. CUDA's part is a stand-in: a GPU's memory is seldom just full enough."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tpserve.model.decoder import FusedDecoder
from tpserve.model.graphs import record


class Graph:
    """As `torch.cuda.CUDAGraph`; counts its replays."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


class Device:
    """What recording says, and on which call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails: Exception | None = None
        self.recording = False
        stream = SimpleNamespace(synchronize=lambda: None, wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", self._graph)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
        monkeypatch.setattr("tpserve.model.decoder._products_by", lambda _: contextlib.nullcontext())
        self.stream: Any = stream

    @contextlib.contextmanager
    def _graph(self, graph: Graph, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        self.recording = True
        try:
            yield
            if self.fails is not None:
                raise self.fails
        finally:
            self.recording = False


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


FULL = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), RuntimeError("CUDA error: out of memory")]


@pytest.mark.parametrize("error", FULL)
def test_no_memory_for_a_graph_is_no_error(device: Device, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(record("8 sequences", lambda: None, None, device.stream), Graph)
    device.fails = error
    assert record("8 sequences", lambda: None, None, device.stream) is None
    assert "no memory for the graph of 8 sequences" in caplog.text


def test_other_errors_are(device: Device) -> None:
    device.fails = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        record("8 sequences", lambda: None, None, device.stream)


def test_a_bucket_without_a_graph_is_launched_and_not_tried_again(device: Device) -> None:
    launched: list[int] = []

    def enqueue(bucket: int) -> None:
        if not device.recording:
            launched.append(bucket)

    rows_S = torch.zeros(8, dtype=torch.int64)
    decoder: Any = FusedDecoder.__new__(FusedDecoder)
    decoder.buckets, decoder.wanted, decoder._graphs = [1, 4], None, {}
    decoder._device, decoder._stream, decoder._pool = rows_S.device, device.stream, None
    decoder.step = SimpleNamespace(
        rows_S=rows_S, positions_S=rows_S.clone(), logits_SV=torch.zeros(8, 3), enqueue=enqueue
    )
    one, three = torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    decoder(three, three)
    assert (decoder.wanted, decoder.missing, launched) == (4, [1, 4], [4])
    device.fails = FULL[0]
    decoder.capture(4)
    assert (decoder.wanted, decoder.missing, launched) == (None, [1], [4, 4])  # once to warm up
    device.fails = None
    decoder.capture(4)
    decoder.capture(1)
    assert (decoder.missing, launched) == ([], [4, 4, 1])
    decoder(three, three)
    decoder(one, one)
    assert (decoder.wanted, launched) == (None, [4, 4, 1, 4])
    assert decoder._graphs[1].replays == 1

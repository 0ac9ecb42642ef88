"""Recording a CUDA graph where memory is short: on a CPU, with a stand-in for the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tpserve.model.decoder import record
from tpserve.model.parallel import TensorParallel

STREAM: Any = SimpleNamespace(device=torch.device("cpu"))


class Ranks(TensorParallel):
    """Two, of which the other one says so."""

    def __init__(self, other: float) -> None:
        super().__init__(0, 2, None)
        object.__setattr__(self, "other", other)
        object.__setattr__(self, "said", [])

    def all_agree(self, ok: torch.Tensor) -> bool:
        self.said.append(ok.item())  # type: ignore[attr-defined]
        return bool(ok.item()) and self.other == 1  # type: ignore[attr-defined]


def driver_error(code: int | None) -> Exception:
    error = torch.AcceleratorError("CUDA error")
    if code is not None:
        error.error_code = code  # type: ignore[attr-defined]
    return error


def raising(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.fixture(autouse=True)
def _graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def recording(*args: object, **named: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", recording)


@pytest.mark.parametrize("tp", [TensorParallel(), Ranks(1.0)])
def test_there_is_memory(tp: TensorParallel) -> None:
    done: list[int] = []
    assert record(lambda: done.append(1), None, STREAM, tp) == "graph"
    assert done == [1]


def test_another_rank_has_none() -> None:
    """NCCL wants a collective in everybody's graph or in nobody's."""
    assert record(lambda: None, None, STREAM, Ranks(0.0)) is None


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("no more"), driver_error(2)], ids=["torch", "driver"])
def test_there_is_none(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(1.0)
    assert record(raising(error), None, STREAM, ranks) is None
    assert ranks.said == [0], "the others wait for an answer"  # type: ignore[attr-defined]
    assert "no memory for a CUDA graph" in caplog.text


@pytest.mark.parametrize("error", [driver_error(700), driver_error(None), RuntimeError("else")], ids=str)
def test_other_failures_are_not_hidden(error: Exception) -> None:
    with pytest.raises(type(error)):
        record(raising(error), None, STREAM, TensorParallel())

"""What makes later steps faster is done between steps: a piece a step, all of it when nobody waits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.local import LocalEngine
from tpserve.engine.config import EngineConfig
from tpserve.engine.sampling_params import SamplingParams
from tpserve.model.fused_network import FusedNetwork


class Improvable:
    """A network in front of another that notes when it is improved; six pieces."""

    def __init__(self, network: object) -> None:
        self._network = network
        self.draw, self.draw_greedy = network.draw, network.draw_greedy  # type: ignore[attr-defined]
        self.drawn_N = None
        self.log: list[str] = []

    def __call__(self, inputs: object) -> object:
        self.log.append("step")
        return self._network(inputs)  # type: ignore[operator]

    @property
    def improvable(self) -> bool:
        return len(self.log) - self.log.count("step") < 6

    def improve(self, idle: bool) -> None:
        self.log.append("idle" if idle else "busy")


@pytest.fixture
def engine(tiny_checkpoint: Path) -> LocalEngine:
    return LocalEngine(EngineConfig(checkpoint_dir=str(tiny_checkpoint), max_seq_len=64, self_test=False))


def test_a_piece_a_step_and_the_rest_when_idle(engine: LocalEngine) -> None:
    network = Improvable(engine.core._runner.network)  # type: ignore[attr-defined]
    engine.core._runner.network = network  # type: ignore[attr-defined]
    engine.submit("a", [5, 6, 7], SamplingParams(max_new_tokens=3, ignore_eos=True), lambda output: None)
    engine.run()
    assert network.log == ["step", "busy", "step", "busy", "step", "busy", "idle"]
    while not engine.core.is_idle:
        engine.step()
    assert network.log[7:] == ["idle", "idle"]
    engine.step()
    assert network.log[9:] == [], "improved although there was nothing left"


def test_work_is_never_idle(engine: LocalEngine) -> None:
    assert engine.core.is_idle
    engine.submit("a", [5, 6, 7], SamplingParams(max_new_tokens=2, ignore_eos=True), lambda output: None)
    engine.step()
    assert not engine.core.is_idle
    engine.run()
    assert engine.core.is_idle


class Graphs:
    """Of three buckets; notes what it is asked to capture."""

    def __init__(self) -> None:
        self.missing, self.wanted, self.captured = [1, 2, 4], None, []  # type: ignore[var-annotated]

    def capture(self, bucket: int) -> None:
        self.missing.remove(bucket)
        self.wanted = None
        self.captured.append(bucket)


def test_graphs_that_steps_have_missed_come_first_then_the_largest() -> None:
    decodes, chunks = Graphs(), Graphs()
    network = FusedNetwork.__new__(FusedNetwork)  # its kernels need a GPU
    network._captures = [decodes, chunks]  # type: ignore[list-item]
    network.improve(idle=False)
    assert decodes.captured == chunks.captured == [], "nobody has missed anything"
    chunks.wanted = 2  # type: ignore[assignment]
    network.improve(idle=True)
    assert (decodes.captured, chunks.captured) == ([], [2])
    chunks.wanted, decodes.wanted = 4, 1  # type: ignore[assignment]
    network.improve(idle=False)
    network.improve(idle=False)
    network.improve(idle=False)
    assert (decodes.captured, chunks.captured) == ([1], [2, 4])
    for _ in range(3):
        assert network.improvable
        network.improve(idle=True)
    assert (decodes.captured, chunks.captured) == ([1, 4, 2], [2, 4, 1])
    assert not network.improvable
    network.improve(idle=True)

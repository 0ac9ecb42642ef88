"""Tokens that a lone sequence draws without the host in between are those that it draws one by one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.scheduling import make_scheduler, make_sequence
from tests.engine.ways import SAMPLED, WAYS, answers, assert_same
from tests.helpers.groups import with_
from tests.helpers.local import LocalEngine
from tests.helpers.requests import Collected
from tests.helpers.stories import converted, prompts
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError
from tpserve.engine.sampling_params import Guided
from tpserve.engine.scheduler import Scheduler
from tpserve.engine.step import StepResult
from tpserve.model.network import PlainNetwork

STEPS = 5


def engine(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> LocalEngine:
    """With a network that says what `CompiledNetwork` does: a step takes 2 ms."""
    with monkeypatch.context() as patch:
        patch.setattr(PlainNetwork, "lone_step_s", 0.002)
        return LocalEngine(with_(config, multi_step_ms=2.0 * STEPS + 1))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = str(converted(tmp_path_factory.mktemp("multi_step")))
    return EngineConfig(checkpoint_dir=folder, device="cpu", max_seq_len=128, max_num_seqs=8, self_test=False)


@pytest.fixture(scope="module")
def single(config: EngineConfig) -> LocalEngine:
    return LocalEngine(config)


@pytest.fixture(scope="module")
def several(config: EngineConfig) -> LocalEngine:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return engine(config, monkeypatch)


@pytest.mark.parametrize("way", WAYS)
def test_they_are_the_same(single: LocalEngine, several: LocalEngine, way: str) -> None:
    for i, prompt in enumerate(prompts(4, seed=13)):
        how = {"max_new_tokens": 31 + i} | WAYS[way]  # all remainders of STEPS
        (expected,), (stream,) = answers(single, [prompt], how), answers(several, [prompt], how)
        assert_same(stream, expected)
        if "n" not in how:
            assert stream.num_outputs <= 2 + len(expected.ids) // STEPS, "they did not come together"


def test_few_blocks(config: EngineConfig, single: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last blocks are taken one by one, and somebody who comes meanwhile is served from what is left."""
    short = engine(with_(config, num_kv_blocks=32, block_size=4), monkeypatch)
    some = prompts(3, seed=5)
    for how in ({"max_new_tokens": 110, "ignore_eos": True}, SAMPLED):
        for prompt in some:
            assert_same(answers(short, [prompt], how)[0], answers(single, [prompt], how)[0])
    for stream, expected in zip(answers(short, some, how), answers(single, some, how), strict=True):
        assert_same(stream, expected)


def test_whoever_comes_in_between_is_served(single: LocalEngine, several: LocalEngine) -> None:
    long, late = prompts(2, seed=6)
    how: dict[str, Any] = {"ignore_eos": True, "max_new_tokens": 40}
    expected = answers(single, [long, late], how)
    first = Collected(several, long, **how)  # type: ignore[arg-type]
    for _ in range(4):
        several.step()
    assert 0 < len(first.ids) < 40
    second = Collected(several, late, **how)  # type: ignore[arg-type]
    several.run()
    assert [first.ids, second.ids] == [stream.ids for stream in expected]


def test_a_cancelled_one_leaves_nothing(several: LocalEngine) -> None:
    stream = Collected(several, prompts(1, seed=7)[0], max_new_tokens=100, ignore_eos=True)  # type: ignore[arg-type]
    for _ in range(4):
        several.step()
    several.core.scheduler.cancel(stream.request_id)
    said = len(stream.ids)
    several.run()  # which looks at the books
    assert len(stream.ids) == said


def planned(scheduler: Scheduler) -> int:
    plan = scheduler.schedule()
    (entry, *_) = plan.entries
    scheduler.update(plan, StepResult([7] * sum(e.num_draws * len(e.samples) for e in plan.entries)))
    return entry.num_steps


def test_only_who_is_alone_has_several_steps() -> None:
    scheduler = make_scheduler(blocks=60, decode_steps=4)
    scheduler.add(make_sequence("a", 3, 30, arrival=1))
    assert [planned(scheduler) for _ in range(3)] == [1, 4, 4]
    scheduler.add(make_sequence("b", 3, 2, arrival=2))
    assert [planned(scheduler) for _ in range(3)] == [1, 1, 4]


def test_never_more_than_are_wanted() -> None:
    scheduler = make_scheduler(blocks=60, decode_steps=4)
    scheduler.add(make_sequence("a", 3, 8, arrival=1))
    assert [planned(scheduler) for _ in range(3)] == [1, 4, 3]
    assert not scheduler.has_work


@pytest.mark.parametrize(("drafts", "how"), [(2, {}), (0, {"beam_width": 2}), (0, {"guided": Guided("regex", "a+")})])
def test_not_where_the_host_must_have_its_say(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, drafts: int, how: dict[str, Any]
) -> None:
    ours = engine(with_(config, num_speculative_tokens=drafts), monkeypatch)
    seen: list[int] = []
    schedule = ours.core.scheduler.schedule

    def spy() -> Any:
        plan = schedule()
        seen.extend(entry.num_steps for entry in plan.entries)
        return plan

    monkeypatch.setattr(ours.core.scheduler, "schedule", spy)
    Collected(ours, prompts(1, seed=8)[0], max_new_tokens=9, **how)  # type: ignore[arg-type]
    ours.run()
    assert seen
    assert set(seen) == {1}


def test_none_and_too_many() -> None:
    with pytest.raises(ConfigError, match="multi_step_ms"):
        EngineConfig(checkpoint_dir="", multi_step_ms=-1.0)
    with pytest.raises(ConfigError, match="no other request begins"):
        EngineConfig(checkpoint_dir="", multi_step_ms=2000.0)


@pytest.mark.parametrize(("given_ms", "steps"), [(0.0, 1), (1.9, 1), (4.1, 2), (32.5, 16)])
def test_as_many_as_fit(config: EngineConfig, monkeypatch: pytest.MonkeyPatch, given_ms: float, steps: int) -> None:
    monkeypatch.setattr(PlainNetwork, "lone_step_s", 0.002)
    assert LocalEngine(with_(config, multi_step_ms=given_ms)).core.shape.decode_steps == steps
    monkeypatch.setattr(PlainNetwork, "lone_step_s", None)
    assert LocalEngine(with_(config, multi_step_ms=given_ms)).core.shape.decode_steps == 1

"""The scheduler as a state machine: whatever arrives, leaves or runs short, nothing is lost, starved or miscounted."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tpserve.engine.block_pool import BlockPool
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.scheduler import ScheduledSequence, Scheduler
from tpserve.engine.sequence import Sequence

BLOCK, BLOCKS, MAX_LEN, MAX_SEQS, BUDGET = 4, 12, 40, 4, 10
EOS = 2


def make_sequence(request_id: str, prompt: int, new: int) -> Sequence:
    params = SamplingParams(max_new_tokens=new)
    return Sequence(request_id, list(range(100, 100 + prompt)), params, max_seq_len=MAX_LEN, eos_token_id=EOS)


def make_scheduler(blocks: int = BLOCKS, budget: int = BUDGET, max_seqs: int = MAX_SEQS) -> Scheduler:
    return Scheduler(BlockPool(blocks), block_size=BLOCK, max_num_seqs=max_seqs, max_num_batched_tokens=budget)


class FakeModel:
    """Remembers what was written into each slot, as the KV cache would, and what a sample must be able to see."""

    def __init__(self) -> None:
        self.slots: dict[int, tuple[int, int]] = {}  # slot → (token, position)

    def run(self, plan: list[ScheduledSequence]) -> list[int]:
        for entry in plan:
            seq = entry.seq
            for p in range(seq.num_computed_tokens, seq.num_computed_tokens + entry.num_query_tokens):
                self.slots[seq.block_table[p // BLOCK] * BLOCK + p % BLOCK] = (seq.token_ids[p], p)
        tokens = []
        for entry in plan:
            seq = entry.seq
            if entry.samples:
                for p, token in enumerate(seq.token_ids):
                    assert self.slots[seq.block_table[p // BLOCK] * BLOCK + p % BLOCK] == (token, p), (
                        "cache overwritten"
                    )
                tokens.append(next_token(seq))
        return tokens


def next_token(seq: Sequence) -> int:
    """Depends on the sequence alone; now and then EOS."""
    value = random.Random(f"{seq.request_id}{seq.token_ids}").randrange(40)
    return EOS if value == 0 else 1000 + value


def alone(request_id: str, prompt: int, new: int) -> list[int]:
    """What the request must generate, whoever else is there."""
    seq = make_sequence(request_id, prompt, new)
    while True:
        token = next_token(seq)
        reason = seq.finish_reason_after(token)
        if reason != "stop":
            seq.token_ids.append(token)
        if reason:
            return seq.token_ids[prompt:]


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler()
        self.model = FakeModel()
        self.requests: dict[str, tuple[int, int]] = {}
        self.outputs: dict[str, list[int]] = {}

    @rule(prompt=st.integers(1, MAX_LEN - 1), new=st.integers(1, MAX_LEN))
    def add(self, prompt: int, new: int) -> None:
        request_id = f"r{len(self.outputs)}"
        self.requests[request_id] = (prompt, new)
        self.outputs[request_id] = []
        self.scheduler.add(make_sequence(request_id, prompt, new))

    @precondition(lambda self: self.requests)
    @rule(i=st.integers(0, 1000))
    def cancel(self, i: int) -> None:
        request_id = sorted(self.requests)[i % len(self.requests)]
        del self.requests[request_id]
        self.scheduler.cancel(request_id)

    @precondition(lambda self: self.scheduler.has_work)
    @rule()
    def step(self) -> None:
        running = list(self.scheduler.running)
        plan = self.scheduler.schedule()
        assert plan, "work but an empty step"
        sizes = [entry.num_query_tokens for entry in plan]
        assert 0 < sum(sizes) <= BUDGET
        assert min(sizes) >= 1
        assert sizes == sorted(sizes, key=lambda n: n > 1), "one-token slices come first"
        assert len({entry.seq.request_id for entry in plan}) == len(plan)
        # What was decoding and was not preempted decodes now: no prompt stalls it.
        planned = {entry.seq.request_id for entry in plan}
        for seq in running:
            if seq in self.scheduler.running and seq.num_uncomputed_tokens == 1:
                assert seq.request_id in planned
        for result in self.scheduler.update(plan, self.model.run(plan)):
            request_id = result.seq.request_id
            if result.token_id is not None:
                self.outputs[request_id].append(result.token_id)
            if result.finish_reason:
                prompt, new = self.requests.pop(request_id)
                assert self.outputs[request_id] == alone(request_id, prompt, new)

    @invariant()
    def books_are_right(self) -> None:
        self.scheduler.check_integrity()
        living = {s.request_id for s in [*self.scheduler.running, *self.scheduler.waiting]}
        assert living == set(self.requests)

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "starved"
        assert self.scheduler.pool.num_in_use == 0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=60)


def run_step(scheduler: Scheduler) -> list[tuple[str, int]]:
    plan = scheduler.schedule()
    summary = [(entry.seq.request_id, entry.num_query_tokens) for entry in plan]
    scheduler.update(plan, [7 for entry in plan if entry.samples])
    return summary


def test_a_long_prompt_is_cut_into_chunks_beside_running_streams() -> None:
    scheduler = make_scheduler(blocks=30)
    scheduler.add(make_sequence("short", 3, 30))
    assert run_step(scheduler) == [("short", 3)]
    scheduler.add(make_sequence("long", 25, 5))
    assert [run_step(scheduler) for _ in range(4)] == [
        [("short", 1), ("long", 9)],
        [("short", 1), ("long", 9)],
        [("short", 1), ("long", 7)],
        [("short", 1), ("long", 1)],
    ]


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    scheduler = make_scheduler(blocks=4, budget=16)
    for name in ("old", "young", "later"):
        scheduler.add(make_sequence(name, 4, 12))
    ended: list[str] = []
    preempted: list[str] = []
    while scheduler.has_work:
        before, running = scheduler.num_preemptions, [s.request_id for s in scheduler.running]
        plan = scheduler.schedule()
        if scheduler.num_preemptions > before:
            assert scheduler.waiting[0].request_id == running[-1]
            preempted.append(running[-1])
        results = scheduler.update(plan, [7 for entry in plan if entry.samples])
        ended += [r.seq.request_id for r in results if r.finish_reason]
    assert "young" in preempted
    assert "old" not in preempted
    assert ended == ["old", "young", "later"]


def test_preempted_tokens_are_kept_and_recomputed() -> None:
    scheduler = make_scheduler(blocks=5, budget=16)
    scheduler.add(make_sequence("a", 5, 15))
    scheduler.add(make_sequence("b", 5, 15))
    for _ in range(40):
        if scheduler.num_preemptions:
            break
        run_step(scheduler)
    victim = scheduler.waiting[0]
    assert victim.request_id == "b"
    assert victim.num_tokens > 5
    assert victim.num_computed_tokens == 0
    assert not victim.block_table


def test_a_sequence_that_could_never_run_is_an_error_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="can never run"):
        make_scheduler(blocks=2).add(make_sequence("big", 20, 20))

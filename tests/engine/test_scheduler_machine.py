"""The scheduler as a state machine: whatever arrives, leaves, forks or runs short, nothing is lost, starved, miscounted
or read from a block that holds something else, with steps planned ahead or not."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine.scheduling import BLOCK, BLOCKS, MAX_LEN, MAX_SEQS, FakeDevice, alone, make_config, make_sequence
from tpserve.engine.block_pool import BlockPool
from tpserve.engine.scheduler import Scheduler
from tpserve.engine.sequence import Sequence
from tpserve.engine.step import StepPlan, StepResult


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(overlap=st.booleans(), drafts=st.sampled_from([0, 0, 3]), chunks=st.booleans(), caching=st.booleans(),
                steps=st.sampled_from([1, 1, 3, 9]))  # fmt: skip
    def start(self, overlap: bool, drafts: int, chunks: bool, caching: bool, steps: int) -> None:
        changes: dict[str, Any] = {} if chunks else {"enable_chunked_prefill": False, "max_num_batched_tokens": MAX_LEN}
        config = make_config(
            async_scheduling=overlap, num_speculative_tokens=drafts, enable_prefix_caching=caching,
            prompt_lookup_min=1, **changes,
        )  # fmt: skip
        self.limit = config.max_num_batched_tokens if chunks else MAX_LEN + MAX_SEQS
        self.caching = caching
        self.scheduler = Scheduler(BlockPool(BLOCKS, caching=caching), config, steps)
        self.follower = Scheduler(BlockPool(BLOCKS, caching=caching), config, steps)  # another rank
        self.device = FakeDevice()
        self.under_way: list[tuple[StepPlan, StepPlan, StepResult]] = []
        self.expected: dict[tuple[str, int], list[int]] = {}
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.arrived = 0

    def _both(self, call: Any) -> None:
        call(self.scheduler)
        call(self.follower)

    @rule(prompt=st.integers(1, MAX_LEN - 1), new=st.integers(1, MAX_LEN), priority=st.integers(-1, 1),
          n=st.sampled_from([1, 1, 2, 4]))  # fmt: skip
    def add(self, prompt: int, new: int, priority: int, n: int) -> None:
        self.arrived += 1
        name, arrival = f"r{self.arrived}", self.arrived
        self._both(lambda s: s.add(make_sequence(name, prompt, new, arrival=arrival, priority=priority, n=n)))
        ids = make_sequence(name, prompt, new).token_ids
        for i in range(n):
            self.expected[name, i] = alone(ids, new, i)
            self.outputs[name, i] = []

    @rule(prompt=st.integers(1, 8), new=st.integers(1, 10), width=st.integers(2, 4))
    def add_beams(self, prompt: int, new: int, width: int) -> None:
        # The pool holds width sequences of this length that share nothing: more is refused at submission.
        if width * -(-(prompt + new) // BLOCK) > BLOCKS:
            return
        self.arrived += 1
        name, arrival = f"r{self.arrived}", self.arrived
        self._both(lambda s: s.add(make_sequence(name, prompt, new, arrival=arrival, beam_width=width)))
        self.expected[name, 0] = []

    @precondition(lambda self: self.expected)
    @rule(i=st.integers(0, 1000), whole=st.booleans())
    def cancel(self, i: int, whole: bool) -> None:
        name, index = sorted(self.expected)[i % len(self.expected)]
        if whole or (name, index) not in self.outputs:
            self._both(lambda s: s.cancel(name))
            self.expected = {key: ids for key, ids in self.expected.items() if key[0] != name}
        else:
            self._both(lambda s: s.cancel(name, index))
            del self.expected[name, index]

    def _finish_step(self) -> None:
        plan, followers, result = self.under_way.pop(0)
        ended = []
        for done in self.scheduler.update(plan, result):
            key = done.seq.request_id, done.seq.index
            if done.seq.group is not None:
                assert done.seq.group.finished
                key = key[0], 0
            else:
                self.outputs[key] += done.token_ids
            if done.finish_reason:
                ended.append(key)
        self.follower.update(followers, result)
        for key in ended:
            expected = self.expected.pop(key)
            if key in self.outputs:
                assert self.outputs[key] == expected, key

    @precondition(lambda self: self.scheduler.has_work or self.under_way)
    @rule()
    def step(self) -> None:
        """As `EngineCore.step`."""
        if self.under_way and self.scheduler.must_wait:
            self._finish_step()
        if self.scheduler.has_work:
            self._plan_step()
        if len(self.under_way) > 1 or (self.under_way and not self.planned):
            self._finish_step()

    def _plan_step(self) -> None:
        decoding = [s for s in self.scheduler.running if s.num_uncomputed_tokens == 1 and s.num_tokens < s.max_tokens]
        plan, followers = self.scheduler.schedule(), self.follower.schedule()
        assert view(plan) == view(followers), "two ranks disagree"
        # First come, first served, among equals: nobody runs for the first time before one who came earlier.
        begun = [seq.key[:2] for seq in plan.loads if seq.request_id in plan.scheduled]
        left = [seq.key[:2] for seq in self.scheduler.waiting if not seq.admitted]
        assert not begun or not left or max(begun) < min(left), "somebody was passed over"
        self.planned = bool(plan.entries)
        if not plan.entries:
            assert self.under_way, "work but an empty step"
            return
        sizes = [entry.num_query_tokens for entry in plan.entries]
        assert 0 < sum(sizes) <= self.limit
        assert min(sizes) >= 1
        decodes = [entry.num_query_tokens == 1 and len(entry.samples) == 1 for entry in plan.entries]
        assert decodes == sorted(decodes, reverse=True), "decoding sequences come first"
        planned = [(entry.seq.request_id, entry.seq.index) for entry in plan.entries]
        assert len(set(planned)) == len(planned)
        # What was decoding and was not preempted decodes now: no prompt stalls it.
        for seq in decoding:
            assert seq in self.scheduler.waiting or (seq.request_id, seq.index) in planned
        self.under_way.append((plan, followers, self.device.run(plan)))

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self._both(lambda s: s.check_integrity())
        living = {(s.request_id, s.index if s.group is None else 0) for q in (self.scheduler.running,
                  self.scheduler.waiting) for p in q for s in (p, *p.children)}  # fmt: skip
        assert living == set(self.expected)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not (self.scheduler.has_work or self.under_way):
                break
            self.step()
        assert not self.scheduler.has_work, "starved"
        assert not self.expected
        assert self.scheduler.residency.pool.num_in_use == 0


def view(plan: StepPlan) -> list[Any]:
    def name(seq: Sequence) -> tuple[str, int, int | None]:
        return seq.request_id, seq.index, seq.row

    return [
        [
            (name(e.seq), e.start, e.num_query_tokens, [name(s) for s in e.samples], e.drafts, e.num_steps)
            for e in plan.entries
        ],
        [(name(s), s.token_ids.copy(), s.block_table.copy()) for s in plan.loads],
        [(name(s), place, block) for s, place, block in plan.new_blocks],
        [(name(s), position, token) for s, position, token in plan.writes],
        plan.copies,
        plan.scheduled,
    ]


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=50)

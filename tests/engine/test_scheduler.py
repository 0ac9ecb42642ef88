"""The scheduler as a state machine: whatever arrives, leaves, forks or runs short, nothing is lost, starved, miscounted
or read from a block that holds something else, with steps planned ahead or not."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tpserve.engine.beam_search import BeamGroup
from tpserve.engine.block_pool import BlockPool
from tpserve.engine.config import EngineConfig
from tpserve.engine.sampling_params import Guided, SamplingParams
from tpserve.engine.scheduler import Scheduler
from tpserve.engine.sequence import Sequence
from tpserve.engine.step import Candidate, StepPlan, StepResult

BLOCK, BLOCKS, MAX_LEN, MAX_SEQS, BUDGET = 4, 14, 40, 5, 12
EOS = 2
# Prompts begin alike, so that they meet in the prefix cache; few tokens, so that drafts are often right.
TEXT = [100 + i % 7 for i in range(MAX_LEN)]


def make_config(**changes: Any) -> EngineConfig:
    defaults = {
        "checkpoint_dir": "", "block_size": BLOCK, "max_num_seqs": MAX_SEQS, "max_num_batched_tokens": BUDGET,
        "max_seq_len": MAX_LEN,
    }  # fmt: skip
    return EngineConfig(**(defaults | changes))


def make_sequence(
    request_id: str, prompt: int, new: int, *, arrival: int = 0, priority: int = 0, n: int = 1, beam_width: int = 1
) -> Sequence:
    params = SamplingParams(max_new_tokens=new, n=n, beam_width=beam_width)
    ids = [*TEXT[: prompt - 1], 100 + hash_of(request_id) % 7]
    # The scheduler never looks at an index but to tell answers apart.
    seqs = [
        Sequence(request_id, ids, params, max_seq_len=MAX_LEN, eos_token_ids=(EOS,), index=i, seed=i,
                 key=(priority, arrival or hash_of(request_id)))
        for i in range(n if beam_width == 1 else 1)
    ]  # fmt: skip
    seqs[0].children = seqs[1:]
    if beam_width > 1:
        seqs[0].group = BeamGroup(params, seqs[0])
    return seqs[0]


def hash_of(text: str) -> int:
    return random.Random(text).randrange(10**6)


def make_scheduler(blocks: int = BLOCKS, **changes: Any) -> Scheduler:
    return Scheduler(BlockPool(blocks), make_config(**changes))


def next_token(token_ids: list[int], index: int) -> int:
    """A "model" of the tokens and the answer's index alone: often goes on as TEXT does, seldom with EOS."""
    chance = random.Random(f"{index}{token_ids}")
    if chance.random() < 0.03:
        return EOS
    if chance.random() < 0.7:
        return 100 + (token_ids[-1] - 99) % 7
    return 100 + chance.randrange(7)


def alone(prompt: list[int], new: int, index: int) -> list[int]:
    """What an answer must be, whoever else is there."""
    ids = prompt.copy()
    while len(ids) < min(len(prompt) + new, MAX_LEN):
        token = next_token(ids, index)
        if token == EOS:
            break
        ids.append(token)
    return ids[len(prompt) :]


class FakeDevice:
    """Rows and a KV cache: what every slot and row holds, written and read only as a plan says."""

    def __init__(self) -> None:
        self.slots: dict[int, tuple[tuple[int, ...], int]] = {}  # slot → (all tokens up to it, position)
        self.rows: dict[int, dict[int, int]] = {}  # row → position → token
        self.tables: dict[int, dict[int, int]] = {}
        self.draws: dict[int, list[tuple[Sequence, list[int]]]] = {}

    def run(self, plan: StepPlan) -> StepResult:
        for seq in plan.loads:
            if seq.row is not None:
                self.rows[seq.row] = dict(enumerate(seq.token_ids))
                self.tables[seq.row] = dict(enumerate(seq.block_table))
        for seq, place, block in plan.new_blocks:
            if seq.row is not None:
                self.tables[seq.row][place] = block
        for seq, position, token in plan.writes:
            if seq.row is not None:
                self.rows[seq.row][position] = token
        # All sources are read before any target is written: a block may be copied, given back by its last owner, and
        # be somebody's copy, but never the other way round.
        before = self.slots.copy()
        for place, (source, _) in enumerate(plan.copies):
            assert source not in {target for _, target in plan.copies[:place]}, "a copy of a copy"
        for source, target in plan.copies:
            for i in range(BLOCK):
                if source * BLOCK + i in before:
                    self.slots[target * BLOCK + i] = before[source * BLOCK + i]
        written: dict[int, int] = {}
        for entry in plan.entries:
            row = entry.seq.row
            assert row is not None
            for p in range(entry.start, entry.start + entry.num_query_tokens):
                slot = self.tables[row][p // BLOCK] * BLOCK + p % BLOCK
                history = tuple(self.rows[row][q] for q in range(p + 1))
                assert written.setdefault(slot, row) == row, "two rows write into one slot"
                self.slots[slot] = (history, p)
        result = StepResult([])
        for entry in plan.entries:
            for seq in entry.samples:
                assert seq.row is not None
                for j in range(1 + len(entry.drafts)):
                    end = entry.start + entry.num_query_tokens - len(entry.drafts) + j
                    history = [self.rows[seq.row][q] for q in range(end)]
                    for p in range(end):  # the queries see the keys of exactly these tokens
                        slot = self.tables[seq.row][p // BLOCK] * BLOCK + p % BLOCK
                        assert self.slots[slot] == (tuple(history[: p + 1]), p), "the cache holds something else"
                    token = next_token(history, seq.index)
                    if seq.group is not None:
                        result.candidates[len(result.tokens)] = candidates(history)
                    result.tokens.append(token)
        draw = 0
        for entry in plan.entries:
            for seq in entry.samples:
                assert seq.row is not None
                for j in range(1 + len(entry.drafts)):
                    end = entry.start + entry.num_query_tokens - len(entry.drafts) + j
                    self.rows[seq.row][end] = result.tokens[draw]
                    draw += 1
        return result


def candidates(history: list[int]) -> list[Candidate]:
    chance = random.Random(f"beam{history}")
    tokens = chance.sample([EOS, *range(100, 107)], 6)
    return [Candidate(token, -0.1 - i - chance.random(), 0.0) for i, token in enumerate(tokens)]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(overlap=st.booleans(), drafts=st.sampled_from([0, 0, 3]), chunks=st.booleans(), caching=st.booleans())
    def start(self, overlap: bool, drafts: int, chunks: bool, caching: bool) -> None:
        changes: dict[str, Any] = {} if chunks else {"enable_chunked_prefill": False, "max_num_batched_tokens": MAX_LEN}
        config = make_config(
            async_scheduling=overlap, num_speculative_tokens=drafts, enable_prefix_caching=caching,
            prompt_lookup_min=1, **changes,
        )  # fmt: skip
        self.limit = config.max_num_batched_tokens if chunks else MAX_LEN + MAX_SEQS
        self.caching = caching
        self.scheduler = Scheduler(BlockPool(BLOCKS, caching=caching), config)
        self.follower = Scheduler(BlockPool(BLOCKS, caching=caching), config)  # another rank
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
        [(name(e.seq), e.start, e.num_query_tokens, [name(s) for s in e.samples], e.drafts) for e in plan.entries],
        [(name(s), s.token_ids.copy(), s.block_table.copy()) for s in plan.loads],
        [(name(s), place, block) for s, place, block in plan.new_blocks],
        [(name(s), position, token) for s, position, token in plan.writes],
        plan.copies,
        plan.scheduled,
    ]


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=50)


def run_step(scheduler: Scheduler) -> list[tuple[str, int]]:
    plan = scheduler.schedule()
    summary = [(entry.seq.request_id, entry.num_query_tokens) for entry in plan.entries]
    scheduler.update(plan, StepResult([7 for entry in plan.entries for _ in entry.samples]))
    return summary


def test_a_long_prompt_is_cut_into_chunks_beside_running_streams() -> None:
    scheduler = make_scheduler(blocks=30, max_num_batched_tokens=10)
    scheduler.add(make_sequence("short", 3, 30, arrival=1))
    assert run_step(scheduler) == [("short", 3)]
    scheduler.add(make_sequence("long", 25, 5, arrival=2))
    assert [run_step(scheduler) for _ in range(4)] == [
        [("short", 1), ("long", 9)],
        [("short", 1), ("long", 9)],
        [("short", 1), ("long", 7)],
        [("short", 1), ("long", 1)],
    ]


def test_without_chunks_a_prompt_takes_one_step() -> None:
    scheduler = make_scheduler(blocks=30, enable_chunked_prefill=False, max_num_batched_tokens=MAX_LEN)
    scheduler.add(make_sequence("short", 3, 30, arrival=1))
    run_step(scheduler)
    scheduler.add(make_sequence("long", MAX_LEN - 1, 5, arrival=2))
    scheduler.add(make_sequence("other", 20, 5, arrival=3))
    assert run_step(scheduler) == [("short", 1), ("long", MAX_LEN - 1)]
    # The long one has ended at the context's end; the two share a prefix.
    assert run_step(scheduler) == [("short", 1), ("other", 20 - 19 // BLOCK * BLOCK)]


def test_a_common_prefix_is_computed_once_even_by_those_who_come_together() -> None:
    scheduler = make_scheduler(blocks=30, max_num_batched_tokens=100)
    for i in range(4):
        scheduler.add(make_sequence(f"r{i}", 22, 5, arrival=i + 1))
    assert [n for _, n in run_step(scheduler)] == [22, 2, 2, 2]
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (88, 60)


def test_the_cache_forgets_what_was_used_longest_ago() -> None:
    pool = BlockPool(4)
    hashes = [bytes([i]) for i in range(4)]
    blocks = pool.allocate(4)
    for block, known_as in zip(blocks, hashes, strict=True):
        pool.register(block, known_as)
    pool.release(blocks[2:])
    pool.release(blocks[:2])
    pool.share(pool.lookup(hashes[3:]))
    pool.release([blocks[3]])
    # Released first, in each release the end of the sequence first; the one that was used again is the youngest.
    assert [pool.allocate(1)[0] for _ in range(4)] == [blocks[2], blocks[1], blocks[0], blocks[3]]
    assert pool.lookup(hashes[:1]) == []


def test_prompts_whose_logprobs_are_asked_for_share_a_bound() -> None:
    scheduler = make_scheduler(blocks=1000, max_num_batched_tokens=4096, max_seq_len=2048)
    for i in range(3):
        params = SamplingParams(max_new_tokens=1, prompt_logprobs=0)
        ids = [100 * i + j % 97 for j in range(400)]
        scheduler.add(Sequence(f"r{i}", ids, params, max_seq_len=2048, eos_token_ids=(EOS,), key=(0, i)))
    assert [run_step(scheduler) for _ in range(3)] == [
        [("r0", 400), ("r1", 112)],
        [("r1", 288), ("r2", 224)],
        [("r2", 176)],
    ]


def test_priority_goes_before_arrival() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for arrival, priority in ((1, 0), (2, 1), (3, 0), (4, -1)):
        scheduler.add(make_sequence(f"r{arrival}", 3, 1, arrival=arrival, priority=priority))
    assert [run_step(scheduler)[0][0] for _ in range(4)] == ["r4", "r1", "r3", "r2"]


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    scheduler = make_scheduler(blocks=4, enable_prefix_caching=False)
    for i, name in enumerate(("old", "young", "later")):
        scheduler.add(make_sequence(name, 4, 12, arrival=i + 1))
    ended: list[str] = []
    preempted: list[str] = []
    while scheduler.has_work:
        before, running = scheduler.residency.num_preemptions, [s.request_id for s in scheduler.running]
        plan = scheduler.schedule()
        if scheduler.residency.num_preemptions > before:
            assert scheduler.waiting[0].request_id == running[-1]
            preempted.append(running[-1])
        results = scheduler.update(plan, StepResult([7 for entry in plan.entries for _ in entry.samples]))
        ended += [r.seq.request_id for r in results if r.finish_reason]
    assert "young" in preempted
    assert "old" not in preempted
    assert ended == ["old", "young", "later"]


def test_preempted_tokens_are_kept_and_recomputed() -> None:
    scheduler = make_scheduler(blocks=5, enable_prefix_caching=False)
    scheduler.add(make_sequence("a", 5, 15, arrival=1))
    scheduler.add(make_sequence("b", 5, 15, arrival=2))
    for _ in range(40):
        if scheduler.residency.num_preemptions:
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


def test_whatever_ends_a_turn_ends_and_is_ignored_and_waits() -> None:
    def stops(**how: Any) -> frozenset[int]:
        return Sequence("r", [5], SamplingParams(**how), max_seq_len=64, eos_token_ids=(2, 7, 9)).stop_token_ids

    assert stops() == stops(min_tokens=4) == {2, 7, 9}
    assert stops(stop_token_ids=(3,)) == {2, 3, 7, 9}
    assert stops(ignore_eos=True, stop_token_ids=(3,)) == {3}
    assert stops(ignore_eos=True, guided=Guided("regex", "a")) == {2, 7, 9}

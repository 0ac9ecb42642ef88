"""The scheduler's rules, one by one; `test_scheduler_machine.py` has them all at once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.scheduling import BLOCK, EOS, MAX_LEN, make_scheduler, make_sequence
from tpserve.engine.block_pool import BlockPool
from tpserve.engine.sampling_params import Guided, SamplingParams
from tpserve.engine.scheduler import MAX_DRAFTS, Scheduler
from tpserve.engine.sequence import Sequence
from tpserve.engine.step import StepResult


def run_step(scheduler: Scheduler) -> list[tuple[str, int]]:
    plan = scheduler.schedule()
    summary = [(entry.seq.request_id, entry.num_query_tokens) for entry in plan.entries]
    scheduler.update(
        plan, StepResult([7 for entry in plan.entries for _ in entry.samples for _ in range(entry.num_draws)])
    )
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


def test_logprobs_of_a_prompt_come_in_chunks_whatever_prompts_do() -> None:
    scheduler = make_scheduler(
        blocks=1000, max_num_batched_tokens=2048, max_seq_len=2048, enable_chunked_prefill=False,
        enable_prefix_caching=False,
    )  # fmt: skip
    for i, asked in enumerate((0, None)):
        params = SamplingParams(max_new_tokens=1, prompt_logprobs=asked)
        scheduler.add(Sequence(f"r{i}", [5] * 1200, params, max_seq_len=2048, eos_token_ids=(EOS,), key=(0, i)))
    assert [run_step(scheduler) for _ in range(3)] == [[("r0", 512), ("r1", 1200)], [("r0", 512)], [("r0", 176)]]


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_prompt_that_is_not_cut_finds_its_step_beside_drafts(drafts: int) -> None:
    scheduler = make_scheduler(
        blocks=1000, max_num_batched_tokens=MAX_LEN, enable_chunked_prefill=False, num_speculative_tokens=drafts,
        prompt_lookup_min=1,
    )  # fmt: skip
    ids = [*range(10), *range(10)]
    scheduler.add(Sequence("short", ids, SamplingParams(), max_seq_len=MAX_LEN, eos_token_ids=(EOS,)))
    assert run_step(scheduler) == [("short", 20)]
    scheduler.add(make_sequence("long", MAX_LEN - 1, 1, arrival=2))
    assert [(e.seq.request_id, e.num_query_tokens) for e in scheduler.schedule().entries] == [
        ("short", 1 + drafts), ("long", MAX_LEN - 1),
    ]  # fmt: skip


def test_drafts_leave_half_of_a_step_to_prompts() -> None:
    scheduler = make_scheduler(
        blocks=5000, max_num_seqs=32, max_num_batched_tokens=512, max_seq_len=400, num_speculative_tokens=16,
        prompt_lookup_min=1, enable_prefix_caching=False,
    )  # fmt: skip
    ids = [*range(7, 15), *range(7, 15)]
    for i in range(31):
        scheduler.add(Sequence(f"r{i}", ids, SamplingParams(), max_seq_len=400, eos_token_ids=(EOS,), key=(0, i)))
    run_step(scheduler)
    scheduler.add(Sequence("long", [5] * 300, SamplingParams(), max_seq_len=400, eos_token_ids=(EOS,), key=(0, 99)))
    planned = dict(run_step(scheduler))
    assert sum(planned.values()) == 512
    assert planned.pop("long") == 512 - 31 - 240
    assert sum(planned.values()) == 31 + 240


@pytest.mark.parametrize(("running", "each"), [(1, 16), (40, 12), (200, 2)])
def test_drafts_share_a_bound(running: int, each: int) -> None:
    """Each brings a row of logits."""
    scheduler = make_scheduler(
        blocks=5000, max_num_seqs=200, max_num_batched_tokens=8192, max_seq_len=100, num_speculative_tokens=16,
        prompt_lookup_min=1, enable_prefix_caching=False,
    )  # fmt: skip
    ids = [*range(7, 27), *range(7, 27)]
    for i in range(running):
        scheduler.add(Sequence(f"r{i}", ids, SamplingParams(), max_seq_len=100, eos_token_ids=(EOS,), key=(0, i)))
    run_step(scheduler)
    lengths = [len(entry.drafts) for entry in scheduler.schedule().entries]
    assert len(lengths) == running
    assert lengths == sorted(lengths, reverse=True), "the oldest first"
    assert min(lengths) >= each
    assert sum(lengths) <= MAX_DRAFTS


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

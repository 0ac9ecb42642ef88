"""Which tokens the next step computes.

Every step: one token of each decoding sequence first, then chunks of prompts up to `max_num_batched_tokens`, so that a
long prompt never stalls running streams. A waiting request is admitted, in order of arrival, when the pool has
blocks for all its tokens; it then owns them, so that only decoding ever asks for more. When decoding finds no free
block, the sequence that was admitted last gives back its own and waits at the head of the queue; later it
recomputes what it had (its tokens are kept). Every rank runs this on the same events and reaches the same plan.
"""

from __future__ import annotations

import dataclasses
from collections import deque

from tpserve.engine.block_pool import BlockPool
from tpserve.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class ScheduledSequence:
    """A sequence's part in a step.

    Attributes:
        seq: the sequence; its `num_computed_tokens` is still that before the step.
        num_query_tokens: tokens to compute.
        samples: whether they are all that was missing, so that the step samples its next token.
    """

    seq: Sequence
    num_query_tokens: int
    samples: bool


@dataclasses.dataclass(frozen=True)
class FinishedToken:
    """What one sampled token meant: `token_id` is None when it only stopped the sequence (EOS or a stop token)."""

    seq: Sequence
    token_id: int | None
    finish_reason: str | None


class Scheduler:
    """See the module's text.

    Args:
        pool: the KV blocks.
        block_size: tokens a block.
        max_num_seqs: sequences that may run at once.
        max_num_batched_tokens: tokens of a step; at least max_num_seqs.
    """

    def __init__(self, pool: BlockPool, *, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        assert max_num_batched_tokens >= max_num_seqs, "every running sequence must be able to decode"
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.num_preemptions = 0
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queues a sequence; the caller has checked that the whole pool could hold `seq.max_tokens`."""
        assert self._blocks_for(seq.max_tokens) <= self.pool.num_blocks, f"{seq.request_id} can never run"
        self.waiting.append(seq)

    def cancel(self, request_id: str) -> None:
        """Drops a sequence; unknown ids are ignored."""
        for seq in self.running:
            if seq.request_id == request_id:
                self._end(seq)
                return
        self.waiting = deque(seq for seq in self.waiting if seq.request_id != request_id)

    def schedule(self) -> list[ScheduledSequence]:
        """Plans a step and takes the blocks it needs; sequences with one query token come first."""
        preempted_before = self.num_preemptions
        decoding = self._make_room_for_decoding()
        plan = [ScheduledSequence(seq, 1, samples=True) for seq in decoding]
        budget = self._max_num_batched_tokens - len(plan)
        for seq in self.running:
            if budget and seq.num_uncomputed_tokens > 1:
                budget -= self._append(plan, seq, budget)
        if self.num_preemptions == preempted_before:  # else what was just taken would be given away again
            while budget and self._admit():
                budget -= self._append(plan, self.running[-1], budget)
        plan.sort(key=lambda s: s.num_query_tokens > 1)
        return plan

    def update(self, plan: list[ScheduledSequence], tokens: list[int]) -> list[FinishedToken]:
        """Takes in the step's result.

        Args:
            plan: as `schedule` returned it.
            tokens: one sampled token for each entry with `samples`, in order.

        Returns:
            what each sampled token meant, in the same order.
        """
        results = []
        sampled = iter(tokens)
        for entry in plan:
            seq = entry.seq
            seq.num_computed_tokens += entry.num_query_tokens
            if not entry.samples:
                continue
            token = next(sampled)
            reason = seq.finish_reason_after(token)
            stops = reason == "stop"
            if not stops:
                seq.token_ids.append(token)
            if reason is not None:
                self._end(seq)
            results.append(FinishedToken(seq, None if stops else token, reason))
        return results

    def check_integrity(self) -> None:
        """Asserts what must hold between steps."""
        self.pool.check_integrity([seq.block_table for seq in self.running])
        assert all(not seq.block_table and seq.num_computed_tokens == 0 for seq in self.waiting)
        assert len(self.running) <= self._max_num_seqs
        for seq in self.running:
            assert 0 <= seq.num_computed_tokens < seq.num_tokens
            assert len(seq.block_table) >= self._blocks_for(seq.num_computed_tokens)

    def _make_room_for_decoding(self) -> list[Sequence]:
        """Gives every decoding sequence the block for its next token, preempting from the end of `running`."""
        decoding = []
        for seq in list(self.running):
            if seq.num_uncomputed_tokens > 1:
                continue
            if not seq.block_table:  # was preempted for a sequence before it
                break
            missing = self._blocks_for(seq.num_tokens) - len(seq.block_table)
            while missing > self.pool.num_free and seq.block_table:
                self._preempt_last()
            if not seq.block_table:
                break
            seq.block_table += self.pool.allocate(missing)
            decoding.append(seq)
        return decoding

    def _preempt_last(self) -> None:
        seq = self.running.pop()
        self.pool.release(seq.block_table)
        seq.block_table = []
        seq.num_computed_tokens = 0
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _admit(self) -> bool:
        """Moves the first waiting sequence to `running` if its blocks are there, and one more for each running one."""
        if not self.waiting or len(self.running) >= self._max_num_seqs:
            return False
        needed = self._blocks_for(self.waiting[0].num_tokens)
        if needed + len(self.running) > self.pool.num_free and (self.running or needed > self.pool.num_free):
            return False
        seq = self.waiting.popleft()
        seq.block_table = self.pool.allocate(needed)
        self.running.append(seq)
        return True

    def _append(self, plan: list[ScheduledSequence], seq: Sequence, budget: int) -> int:
        n = min(seq.num_uncomputed_tokens, budget)
        plan.append(ScheduledSequence(seq, n, samples=n == seq.num_uncomputed_tokens))
        return n

    def _end(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.pool.release(seq.block_table)
        seq.block_table = []

    def _blocks_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self._block_size)

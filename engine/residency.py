"""Who waits, who runs, and what those who run hold: KV blocks and a row of the device's batch state.

The scheduler decides; this keeps the books, so that every way in and out of `running` is in one place.
"""

from __future__ import annotations

import itertools
from bisect import insort

from tpserve.engine.block_pool import BlockPool
from tpserve.engine.config import EngineConfig
from tpserve.engine.sequence import Sequence
from tpserve.engine.step import StepPlan


def _order(seq: Sequence) -> tuple[int, ...]:
    return seq.key


class Residency:
    """See the module's text.

    Args:
        pool: the KV blocks.
        config: sizes and switches.

    Attributes:
        waiting, running: sequences, each in order of (priority, arrival, index).
        num_groups: beam searches among them.
        num_preemptions: so far.
    """

    def __init__(self, pool: BlockPool, config: EngineConfig) -> None:
        self.pool = pool
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_groups = 0
        self.num_preemptions = 0
        self._block_size = config.block_size
        self._prefix_caching = config.enable_prefix_caching
        self._num_rows = config.max_num_seqs
        self._rows = list(range(config.max_num_seqs))[::-1]
        self._requests: dict[str, list[Sequence]] = {}

    def add(self, seq: Sequence) -> None:
        """Queues a sequence; the caller has checked that the whole pool could hold `seq.max_tokens`."""
        assert self.blocks_for(seq.max_tokens) <= self.pool.num_blocks, f"{seq.request_id} can never run"
        self._requests.setdefault(seq.request_id, []).extend([seq, *seq.children])
        self.num_groups += seq.group is not None
        insort(self.waiting, seq, key=_order)

    def find(self, request_id: str) -> list[Sequence]:
        """A request's living sequences."""
        return list(self._requests.get(request_id, ()))

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens need."""
        return -(-num_tokens // self._block_size)

    def cached_blocks(self, seq: Sequence) -> list[int]:
        """Blocks of the prefix cache that a waiting sequence can begin with; one token at least is left to compute."""
        if not self._prefix_caching or (seq.params.prompt_logprobs is not None and not seq.said):
            return []
        usable = (seq.num_tokens - 1) // self._block_size
        return self.pool.lookup(seq.extend_hashes(self._block_size)[:usable])

    def can_enter(self, seq: Sequence, cached: list[int], headroom: int) -> bool:
        """Whether there are rows, and blocks for all tokens of a waiting sequence and `headroom` more."""
        if (seq.group is None or not seq.group.admitted) and len(self._rows) < self._rows_for(seq):
            return False
        needed = self.blocks_for(seq.num_tokens) - len(cached) + self.pool.num_free_among(cached)
        return needed + headroom <= self.pool.num_free

    def enter(self, seq: Sequence, cached: list[int], plan: StepPlan) -> None:
        """Moves a waiting sequence to `running`, with `cached` as the beginning of its block table."""
        self.waiting.remove(seq)
        self.pool.share(cached)
        seq.block_table = cached + self.pool.allocate(self.blocks_for(seq.num_tokens) - len(cached))
        seq.num_computed_tokens, seq.num_registered = len(cached) * self._block_size, len(cached)
        if seq.group is not None and not seq.group.admitted:
            seq.group.admitted = True
            seq.group.spare_rows = [self._rows.pop() for _ in range(seq.group.width)]
        for one in (seq, *seq.children):
            one.row = self._spare_rows(seq).pop()
        insort(self.running, seq, key=_order)
        plan.loads.append(seq)

    def join(self, twin: Sequence, seq: Sequence, plan: StepPlan) -> None:
        """Puts another sequence with the same past as `seq` beside it, on the same blocks."""
        twin.block_table = seq.block_table.copy()
        self.pool.share(twin.block_table)
        twin.block_hashes, twin.num_registered = seq.block_hashes.copy(), seq.num_registered
        twin.num_computed_tokens, twin.num_cached_tokens = seq.num_computed_tokens, seq.num_cached_tokens
        twin.admitted = True
        if twin.row is None:
            twin.row = self._spare_rows(twin).pop()
            self._requests[twin.request_id].append(twin)
        insort(self.running, twin, key=_order)
        plan.loads.append(twin)

    def cover(self, seq: Sequence, num_tokens: int, plan: StepPlan) -> int:
        """Makes the blocks of the tokens about to be computed the sequence's own, copying what others share.

        When blocks run short, all but the first are given up; then the last of `running` is preempted.

        Returns:
            How many of `num_tokens` can be computed: all, one, or, if that was the sequence itself, none.
        """
        start, table, size = seq.num_computed_tokens, seq.block_table, self._block_size
        while True:
            missing = max(0, self.blocks_for(start + num_tokens) - len(table))
            copied = start % size > 0 and self.pool.is_shared(table[start // size])
            if not missing and not copied:
                return num_tokens
            if missing + copied <= self.pool.num_free:
                break
            if num_tokens > 1:
                num_tokens = 1
            elif self.preempt_last() is seq:
                return 0
        if copied:
            place = start // size
            (own,) = self.pool.allocate(1)
            plan.copies.append((table[place], own))
            self.pool.release([table[place]])
            table[place] = own
            plan.new_blocks.append((seq, place, own))
        for block in self.pool.allocate(missing):
            plan.new_blocks.append((seq, len(table), block))
            table.append(block)
        return num_tokens

    def register(self, seq: Sequence) -> None:
        """Offers the blocks that are full, computed and known to the prefix cache."""
        full = min(seq.num_computed_tokens, len(seq.token_ids)) // self._block_size
        if full <= seq.num_registered or not self._prefix_caching:
            return
        hashes = seq.extend_hashes(self._block_size)
        for place in range(seq.num_registered, full):
            self.pool.register(seq.block_table[place], hashes[place])
        seq.num_registered = full

    def preempt_last(self) -> Sequence:
        """Takes everything from the last of `running`; it waits, and will compute again what it had."""
        seq = self.running.pop()
        assert seq.num_pending == 0, "a sequence was preempted whose last token is under way"
        self._give_back(seq)
        seq.num_computed_tokens = seq.num_registered = 0
        if not seq.said:
            seq.prompt_logprobs.clear()
        if seq.group is not None:
            seq.group.withdraw(seq)
            if len(seq.group.spare_rows) == seq.group.width:  # none of its beams runs any more
                self._rows += seq.group.spare_rows
                seq.group.spare_rows, seq.group.admitted = [], False
        insort(self.waiting, seq, key=_order)
        self.num_preemptions += 1
        return seq

    def end(self, seq: Sequence) -> None:
        """Drops a sequence for good; the answers that wait for its prompt live on."""
        if seq.children:
            # It computes the prompt for them too: the first of them takes its place.
            child = seq.children.pop(0)
            seq.index, child.index = child.index, seq.index
            seq.seed, seq.matcher = child.seed, child.matcher
            if child.row is not None:
                self._rows.append(child.row)
            self._forget(child)
            return
        for parent in self.find(seq.request_id):
            if seq in parent.children:
                parent.children.remove(seq)
        if seq.block_table:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self._give_back(seq)
        self._forget(seq)

    def end_group(self, seq: Sequence) -> None:
        """Drops a whole beam search."""
        assert seq.group is not None
        for beam in self.find(seq.request_id):
            self.end(beam)
        self._rows += seq.group.spare_rows
        seq.group.spare_rows = []
        self.num_groups -= 1

    def check_integrity(self) -> None:
        """Asserts what must hold between steps."""
        self.pool.check_integrity([seq.block_table for seq in self.running])
        everyone = [one for seq in (*self.running, *self.waiting) for one in (seq, *seq.children)]
        groups = {id(seq.group): seq.group for seq in everyone if seq.group is not None}.values()
        rows = [seq.row for seq in everyone if seq.row is not None]
        spare = [row for group in groups for row in group.spare_rows]
        assert sorted([*rows, *spare, *self._rows]) == list(range(self._num_rows)), "rows are wrong"
        assert len(groups) == self.num_groups
        assert not any(seq.finished for seq in everyone)
        assert all(not seq.block_table and seq.row is None and seq.num_computed_tokens == 0 for seq in self.waiting)
        for queue in (self.waiting, self.running):
            assert all(a.key < b.key for a, b in itertools.pairwise(queue)), "a queue is out of order"
        for seq in self.running:
            assert seq.num_tokens <= seq.max_tokens
            # Drafts under way are computed before they are tokens.
            assert 0 <= seq.num_computed_tokens <= (seq.max_tokens if seq.num_pending else seq.num_tokens)
            assert len(seq.block_table) >= self.blocks_for(seq.num_computed_tokens)
        known = {id(seq) for seqs in self._requests.values() for seq in seqs}
        assert known == {id(seq) for seq in everyone}, "the request table is wrong"

    def _rows_for(self, seq: Sequence) -> int:
        return 1 + len(seq.children) if seq.group is None else seq.group.width

    def _spare_rows(self, seq: Sequence) -> list[int]:
        """Where a sequence's row comes from and goes to: a beam search keeps `width` of them while any beam runs."""
        return self._rows if seq.group is None else seq.group.spare_rows

    def _give_back(self, seq: Sequence) -> None:
        self.pool.release(seq.block_table)
        seq.block_table = []
        for one in (seq, *seq.children):
            if one.row is not None:
                self._spare_rows(one).append(one.row)
                one.row = None

    def _forget(self, seq: Sequence) -> None:
        seq.finished = True
        seqs = self._requests[seq.request_id]
        seqs.remove(seq)
        if not seqs:
            del self._requests[seq.request_id]

"""The block pool as a state machine against a plain model of it."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tpserve.engine.block_pool import ROOT, BlockPool, block_hash

SIZE = 12


class PoolMachine(RuleBasedStateMachine):
    """Owners and contents beside the pool's own books: `held` is what was last written into each block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(SIZE)
        self.tables: list[list[int]] = []
        self.held: dict[int, bytes] = {}
        self.contents = 0

    @rule(n=st.integers(0, SIZE))
    def allocate(self, n: int) -> None:
        if n > self.pool.num_free:
            with pytest.raises(AssertionError):
                self.pool.allocate(n)
            return
        blocks = self.pool.allocate(n)
        assert len(set(blocks)) == n
        assert not set(blocks) & {b for t in self.tables for b in t}
        for block in blocks:
            self.held.pop(block, None)
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(i=st.integers(0, 100))
    def release(self, i: int) -> None:
        self.pool.release(self.tables.pop(i % len(self.tables)))

    @precondition(lambda self: self.tables)
    @rule(i=st.integers(0, 100), same_as=st.integers(0, 100))
    def fill_and_register(self, i: int, same_as: int) -> None:
        """Writes a block's content, now and then one that another block has already, and tells the pool."""
        table = self.tables[i % len(self.tables)]
        for block in table:
            if block not in self.held and not self.pool.is_shared(block):
                known = sorted(set(self.held.values()))
                self.contents += 1
                content = known[same_as % len(known)] if known and same_as < 20 else b"%d" % self.contents
                self.held[block] = content
                self.pool.register(block, content)
                return

    @precondition(lambda self: self.held)
    @rule(i=st.integers(0, 100))
    def find_and_share(self, i: int) -> None:
        content = sorted(self.held.values())[i % len(self.held)]
        found = self.pool.lookup([content])
        for block in found:
            assert self.held[block] == content, "found by a content that it no longer has"
        free = self.pool.num_free
        taken = self.pool.num_free_among(found)
        self.pool.share(found)
        assert self.pool.num_free == free - taken
        self.tables.append(found)

    @rule()
    def what_is_gone_is_not_found(self) -> None:
        assert self.pool.lookup([b"never"]) == []
        assert self.pool.num_cached <= len(self.held)

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check_integrity(self.tables)
        owned = {b for t in self.tables for b in t}
        assert self.pool.num_in_use == len(owned)
        assert self.pool.num_in_use + self.pool.num_free == SIZE
        for block in owned:
            assert self.pool.is_shared(block) == (sum(t.count(block) for t in self.tables) > 1)


TestPool = PoolMachine.TestCase


def test_integrity_check_finds_a_leak_and_a_double_release() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="differ"):
        pool.check_integrity([])
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released while free"):
        pool.release(blocks[:1])


def test_a_hash_stands_for_all_tokens_before_it() -> None:
    first = block_hash(ROOT, [1, 2])
    assert block_hash(first, [3, 4]) == block_hash(block_hash(ROOT, [1, 2]), [3, 4])
    others = [block_hash(ROOT, [3, 4]), block_hash(block_hash(ROOT, [2, 1]), [3, 4]), block_hash(first, [4, 3])]
    assert block_hash(first, [3, 4]) not in others


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(2, caching=False)
    (block,) = pool.allocate(1)
    pool.register(block, b"x")
    assert pool.lookup([b"x"]) == []

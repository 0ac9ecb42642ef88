"""The block pool as a state machine against a plain model of it."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tpserve.engine.block_pool import BlockPool

SIZE = 12


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(SIZE)
        self.tables: list[list[int]] = []

    @rule(n=st.integers(0, SIZE))
    def allocate(self, n: int) -> None:
        if n > self.pool.num_free:
            with pytest.raises(AssertionError):
                self.pool.allocate(n)
            return
        blocks = self.pool.allocate(n)
        assert len(set(blocks)) == n
        assert not set(blocks) & {b for t in self.tables for b in t}
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(i=st.integers(0, 100))
    def release(self, i: int) -> None:
        self.pool.release(self.tables.pop(i % len(self.tables)))

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check_integrity(self.tables)
        assert self.pool.num_in_use == sum(len(t) for t in self.tables)
        assert self.pool.num_in_use + self.pool.num_free == SIZE


TestPool = PoolMachine.TestCase


def test_integrity_check_finds_a_leak_and_a_double_release() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="differ"):
        pool.check_integrity([])
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released while free"):
        pool.release(blocks[:1])

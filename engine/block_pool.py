"""Who owns which KV block."""

from __future__ import annotations

from collections import deque


class BlockPool:
    """Counts the owners of every block; a block with none is free.

    Deterministic: every rank makes the same calls and gets the same block numbers.

    Args:
        num_blocks: blocks of the cache, numbered from 0.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._owners = [0] * num_blocks
        self._free = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        """Blocks with at least one owner."""
        return self.num_blocks - len(self._free)

    def allocate(self, n: int) -> list[int]:
        """Takes `n` free blocks, each with one owner; the caller has looked at `num_free`."""
        assert 0 <= n <= len(self._free), f"{n} blocks asked, {len(self._free)} free"
        blocks = [self._free.popleft() for _ in range(n)]
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Takes one owner from each block; those without one are free again."""
        for block in blocks:
            assert self._owners[block] > 0, f"block {block} released while free"
            self._owners[block] -= 1
            if self._owners[block] == 0:
                self._free.append(block)

    def check_integrity(self, tables: list[list[int]]) -> None:
        """Asserts that the owners' tables and the pool tell the same story.

        Args:
            tables: the block tables of all living sequences.
        """
        counted = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counted[block] += 1
        assert counted == self._owners, "block owners differ from the sequences' tables"
        assert sorted(self._free) == [b for b in range(self.num_blocks) if counted[b] == 0], "free list is wrong"

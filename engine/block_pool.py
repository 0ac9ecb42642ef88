"""Who owns which KV block, and which tokens a block holds.

A full block is known by a hash of its tokens and of the block before it, so that a sequence finds what others
computed of its prompt. A block without owners is free, yet keeps its content and its hash until somebody needs its
place; the one that has been free the longest goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BlockHash = bytes
ROOT: BlockHash = b""  # what stands before a prompt's first block


def block_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """The hash of a full block: BLAKE2b over the hash before it and its ids.

    A cryptographic hash: prompts come from strangers, and a collision would show one the other's context.
    """
    return hashlib.blake2b(parent + array("i", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """Counts the owners of every block, and finds blocks by content.

    Deterministic: every rank makes the same calls and gets the same block numbers.

    Args:
        num_blocks: blocks of the cache, numbered from 0.
        caching: whether blocks can be found by content.
    """

    def __init__(self, num_blocks: int, *, caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self._caching = caching
        self._owners = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be reused first
        self._by_hash: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give, those with cached content among them."""
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        """Blocks with at least one owner."""
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by their content."""
        return len(self._hash_of)

    def is_shared(self, block: int) -> bool:
        """Whether writing into the block would be seen by another owner."""
        return self._owners[block] > 1

    def num_free_among(self, blocks: list[int]) -> int:
        """How many of `blocks` would leave the free list if they were shared now."""
        return sum(self._owners[block] == 0 for block in blocks)

    def allocate(self, n: int) -> list[int]:
        """Takes `n` free blocks, each with one owner; what they held is forgotten.

        The caller has looked at `num_free`.
        """
        assert 0 <= n <= len(self._free), f"{n} blocks asked, {len(self._free)} free"
        blocks = [self._free.popitem(last=False)[0] for _ in range(n)]
        for block in blocks:
            self._owners[block] = 1
            known = self._hash_of.pop(block, None)
            if known is not None:
                del self._by_hash[known]
        return blocks

    def share(self, blocks: list[int]) -> None:
        """Adds an owner to each block; free ones (found by content) are taken from the free list."""
        for block in blocks:
            if self._owners[block] == 0:
                del self._free[block]
            self._owners[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Takes one owner from each block; those without one are free again.

        The end of a sequence is reused before its beginning, which more prompts have in common, and blocks that
        nobody can find go first.
        """
        for block in reversed(blocks):
            assert self._owners[block] > 0, f"block {block} released while free"
            self._owners[block] -= 1
            if self._owners[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, known_as: BlockHash) -> None:
        """Makes a full block findable; another block with the same content keeps its place."""
        if self._caching and known_as not in self._by_hash and block not in self._hash_of:
            self._by_hash[known_as] = block
            self._hash_of[block] = known_as

    def lookup(self, hashes: Sequence[BlockHash]) -> list[int]:
        """The blocks that hold the longest known beginning of a chain of hashes; takes none of them."""
        found = []
        for known_as in hashes:
            block = self._by_hash.get(known_as)
            if block is None:
                break
            found.append(block)
        return found

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
        assert {known_as: block for block, known_as in self._hash_of.items()} == self._by_hash, "hashes are wrong"

"""Philox4x32-10, a random function of (key, counter), for Python's integers; `sampling.uniform` has it for tensors.

Needs no torch, as the side that admits requests has none.
"""

from __future__ import annotations

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: multipliers and Weyl increments of Philox4x32,
# and the rounds with which it passes every test of TestU01 with room to spare.
MUL_0, MUL_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
NUM_ROUNDS = 10
MASK_32 = 0xFFFFFFFF

# The last word of a counter; the first two are a position or an index. Two purposes never share a counter.
DRAW, CHOICE = 0, 1


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The Philox4x32 bijection (Salmon et al., SC 2011, figure 2); every number is of 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        product0, product1 = c0 * MUL_0, c2 * MUL_1
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & MASK_32, (product0 >> 32) ^ c3 ^ k1, product0 & MASK_32
        k0, k1 = (k0 + WEYL_0) & MASK_32, (k1 + WEYL_1) & MASK_32
    return c0, c1, c2, c3


def choice_seed(seed: int, index: int) -> int:
    """The seed of one of a request's answers.

    Args:
        seed: the request's, from 0 to 2**64 - 1.
        index: the answer's, from 0.

    Returns:
        The request's own seed for answer 0, so that n=1 and the first of n=5 are the same text; for the others 64 bits
        of Philox under the request's seed, at counters that no draw uses.
    """
    if index == 0:
        return seed
    low, high, _, _ = philox4x32((index & MASK_32, index >> 32, 0, CHOICE), (seed & MASK_32, seed >> 32))
    return low | high << 32

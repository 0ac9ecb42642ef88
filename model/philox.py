"""Philox4x32-10, a random function of (key, counter), once for Python's integers and for tensors. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: multipliers and Weyl increments of Philox4x32.
_MUL_0, _MUL_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
MASK_32 = 0xFFFFFFFF

# Counters are (position, low and high, 0, purpose): two purposes never share one.
DRAW, CHOICE = 0, 1

Word = TypeVar("Word", int, "torch.Tensor")


def philox4x32(
    counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word], rounds: int = 10
) -> tuple[Word, Word, Word, Word]:
    """The Philox4x32 bijection (Salmon et al., SC 2011, figure 2).

    Args:
        counter: four numbers below 2**32, as int or as int64 tensors of one shape.
        key: two of the same kind.
        rounds: the paper's 10 pass every test of TestU01.

    Returns:
        Four numbers below 2**32, of the same kind.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = c0 * _MUL_0, c2 * _MUL_1  # an int64 wraps beyond 2**63; its 64 bits are still right
        c0, c1, c2, c3 = (
            high_word(product1) ^ c1 ^ k0,
            product1 & MASK_32,
            high_word(product0) ^ c3 ^ k1,
            product0 & MASK_32,
        )
        k0, k1 = (k0 + _WEYL_0) & MASK_32, (k1 + _WEYL_1) & MASK_32
    return c0, c1, c2, c3


def high_word(x: Word) -> Word:
    """The upper 32 of 64 bits, as an unsigned number (an int64's >> keeps the sign, the mask drops it)."""
    return (x >> 32) & MASK_32


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
    low, high, _, _ = philox4x32((index & MASK_32, high_word(index), 0, CHOICE), (seed & MASK_32, high_word(seed)))
    return low | high << 32

"""Philox: published vectors, as integers and as tensors; the seeds made of it."""

from __future__ import annotations

import pytest
import torch

from tpserve.model.philox import choice_seed, philox4x32

# Random123's known-answer vectors for philox4x32-10: counter, key, output.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_philox_vectors(counter: str, key: str, output: str) -> None:
    c, k, o = ([int(w, 16) for w in words.split()] for words in (counter, key, output))
    assert philox4x32((c[0], c[1], c[2], c[3]), (k[0], k[1])) == tuple(o)
    d, j = ([torch.tensor([w]) for w in words] for words in (c, k))
    assert [w.item() for w in philox4x32((d[0], d[1], d[2], d[3]), (j[0], j[1]))] == o


def test_choices_have_seeds_of_their_own() -> None:
    seeds = [*range(50), *(2**64 - 1 - i for i in range(50))]
    pairs = [(seed, index) for seed in seeds for index in range(100)]
    derived = [choice_seed(seed, index) for seed, index in pairs]
    assert len(set(derived)) == len(pairs) == 10_000
    assert all(0 <= seed < 2**64 for seed in derived)
    assert [derived[i] for i, (_, index) in enumerate(pairs) if index == 0] == seeds
    low, high, zero = (torch.tensor(x) for x in ([s & 0xFFFFFFFF for s, _ in pairs], [s >> 32 for s, _ in pairs], 0))
    index = torch.tensor([index for _, index in pairs])
    words = philox4x32((index, zero, zero, zero + 1), (low, high))
    expected = [a | b << 32 for a, b in zip(words[0].tolist(), words[1].tolist(), strict=True)]
    assert all(d == e for d, e, (_, i) in zip(derived, expected, pairs, strict=True) if i)

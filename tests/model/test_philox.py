"""Philox: published vectors, as integers and as tensors; the seeds made of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpserve.model import sampling
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
    even, odd = sampling.philox4x32(*(torch.tensor(words)[:, None] for words in (c[::2], c[1::2], k)))
    assert even.flatten().tolist() == o[::2]
    assert odd.flatten().tolist() == o[1::2]


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**40)), min_size=1, max_size=9))
def test_tensors_are_drawn_like_integers(pairs: list[tuple[int, int]]) -> None:
    seeds = torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed, _ in pairs])
    expected = []
    for seed, position in pairs:
        words = philox4x32((position & 0xFFFFFFFF, position >> 32, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
        expected.append(((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53)
    assert sampling.uniform(seeds, torch.tensor([position for _, position in pairs])).tolist() == expected


def test_choices_have_seeds_of_their_own() -> None:
    seeds = [*range(50), *(2**64 - 1 - i for i in range(50))]
    pairs = [(seed, index) for seed in seeds for index in range(100)]
    derived = [choice_seed(seed, index) for seed, index in pairs]
    assert len(set(derived)) == len(pairs) == 10_000
    assert all(0 <= seed < 2**64 for seed in derived)
    assert [derived[i] for i, (_, index) in enumerate(pairs) if index == 0] == seeds
    index = torch.tensor([index for _, index in pairs])
    even, odd = sampling.philox4x32(
        torch.stack((index, index * 0)),
        torch.stack((index * 0, index * 0 + 1)),
        torch.tensor([[seed & 0xFFFFFFFF for seed, _ in pairs], [seed >> 32 for seed, _ in pairs]]),
    )
    expected = [low | high << 32 for low, high in zip(even[0].tolist(), odd[0].tolist(), strict=True)]
    assert all(d == e for d, e, (_, i) in zip(derived, expected, pairs, strict=True) if i)

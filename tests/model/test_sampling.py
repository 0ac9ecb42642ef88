"""Sampling: the generator against published vectors, the draws against their distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpserve.model.sampling import SamplingBatch, philox4x32, sample, token_logprobs, uniform

V = 40


def _batch(
    n: int,
    temperature: float = 1.0,
    top_k: int = V,
    top_p: float = 1.0,
    seeds: torch.Tensor | None = None,
    position: int = 7,
) -> SamplingBatch:
    return SamplingBatch(
        torch.full((n,), temperature),
        torch.full((n,), top_k),
        torch.full((n,), top_p),
        torch.arange(n) if seeds is None else seeds,
        torch.full((n,), position),
        any_random=temperature > 0,
        any_filter=top_k < V or top_p < 1,
    )


# Random123's known-answer vectors for philox4x32-10: counter, key, output.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_philox_vectors(counter: str, key: str, output: str) -> None:
    c, k, o = ([torch.tensor([int(w, 16)]) for w in words.split()] for words in (counter, key, output))
    assert [w.item() for w in philox4x32((c[0], c[1], c[2], c[3]), (k[0], k[1]))] == [w.item() for w in o]


def test_uniform_is_uniform_over_seeds_and_positions() -> None:
    n = 20000
    for u in (uniform(torch.arange(n), torch.full((n,), 3)), uniform(torch.full((n,), -5), torch.arange(n))):
        assert 0 <= u.min() < u.max() < 1
        counts = torch.histc(u, bins=20, min=0, max=1)
        assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 50  # chi-square, 19 degrees of freedom: p < 1e-4


def test_draws_follow_the_distribution() -> None:
    torch.manual_seed(0)
    n, logits = 40000, torch.randn(V) * 1.5
    tokens = sample(logits.expand(n, V), _batch(n, temperature=0.7))
    expected = (logits / 0.7).softmax(-1) * n
    counts = torch.bincount(tokens, minlength=V)
    assert ((counts - expected) ** 2 / expected).sum() < 90  # chi-square, 39 degrees of freedom: p < 1e-5


@given(st.integers(0, 10**6), st.integers(1, V), st.floats(0.01, 1.0))
def test_filters_keep_exactly_the_nucleus(seed: int, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(V, generator=generator) * 2
    allowed: set[int] = set()
    order = logits.argsort(descending=True)[:top_k]
    mass = 0.0
    probs = logits[order].double().softmax(-1)
    for token, p in zip(order.tolist(), probs.tolist(), strict=True):
        if allowed and mass >= top_p - 1e-6:
            break
        allowed.add(token)
        mass += p
    tokens = sample(logits.expand(300, V), _batch(300, top_k=top_k, top_p=top_p))
    assert set(tokens.tolist()) <= allowed


def test_greedy_and_random_rows_share_a_batch() -> None:
    logits = torch.randn(6, V)
    batch = _batch(6, temperature=1.0)
    batch.temperature_N[::2] = 0
    mixed = sample(logits, batch)
    assert torch.equal(mixed[::2], logits.argmax(-1)[::2])
    assert torch.equal(mixed[1::2], sample(logits, _batch(6))[1::2])
    assert torch.equal(sample(logits, _batch(6, temperature=0)), logits.argmax(-1))


def test_a_token_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(8, V)
    together = sample(logits, _batch(8, top_p=0.9, top_k=20))
    for i in range(8):
        alone = sample(logits[i : i + 1], _batch(1, top_p=0.9, top_k=20, seeds=torch.tensor([i])))
        assert alone.item() == together[i].item()


def test_nearly_equal_logits_that_change_places_keep_the_token() -> None:
    logits = torch.zeros(2, V)
    logits[0, 3], logits[0, 30] = 2.0, 2.0000002
    logits[1, 3], logits[1, 30] = 2.0000002, 2.0
    for seed in range(500):
        seeds = torch.tensor([seed, seed])
        a, b = sample(logits, _batch(2, seeds=seeds)).tolist()
        assert a == b


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = torch.randn(3, V)
    tokens = torch.tensor([0, 5, 39])
    torch.testing.assert_close(token_logprobs(logits, tokens), logits.log_softmax(-1)[torch.arange(3), tokens])

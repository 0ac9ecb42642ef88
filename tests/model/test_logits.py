"""Logits: penalties, bias, bans and log-probabilities against a plain reading of their definitions.

Shape suffixes: N rows of the batch, V vocabulary, L history, W mask words, K most probable tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpserve.model.sampling import (
    BadWords,
    Penalties,
    SamplingBatch,
    SparseBias,
    process_logits,
    token_logprobs,
    top_logprobs,
)

V = 37  # no multiple of 32, nor of a vector's lanes
L = 12
GARBAGE = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One row's controls and history."""

    prompt: list[int] = dataclasses.field(default_factory=lambda: [1])
    output: list[int] = dataclasses.field(default_factory=list)
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    bad_words: list[list[int]] = dataclasses.field(default_factory=list)
    allowed: frozenset[int] | None = None


def make_batch(rows: Sequence[Row], dtype: torch.dtype = torch.int64) -> SamplingBatch:
    """The batch as the engine builds it: what no row uses is None."""
    n = len(rows)
    history_NL = torch.full((n, L), GARBAGE, dtype=dtype)
    for i, row in enumerate(rows):
        history_NL[i, : len(row.prompt + row.output)] = torch.tensor(row.prompt + row.output, dtype=dtype)
    bias = [(i, token, value) for i, row in enumerate(rows) for token, value in row.bias]
    words = [(i, word) for i, row in enumerate(rows) for word in row.bad_words]
    width = max((len(word) - 1 for _, word in words), default=0)
    mask = np.full((n, (V + 31) // 32), -1, dtype=np.int32)
    for i, row in enumerate(rows):
        if row.allowed is not None:
            bits = [v in row.allowed for v in range(mask.shape[1] * 32)]
            mask[i] = np.packbits(bits, bitorder="little").view("<i4")
    penalized = any((row.repetition, row.presence, row.frequency) != (1, 0, 0) for row in rows)
    zero = torch.zeros(n)
    return SamplingBatch(
        temperature_N=zero, top_k_N=zero.long() + V, top_p_N=zero.double() + 1, min_p_N=zero, seed_N=zero.long(),
        position_N=torch.tensor([len(row.prompt + row.output) for row in rows]),
        any_random=False, any_filter=False, any_min_p=False,
        history_NL=history_NL if penalized or words else None,
        penalties=Penalties(
            torch.tensor([row.repetition for row in rows], dtype=torch.float32),
            torch.tensor([row.presence for row in rows], dtype=torch.float32),
            torch.tensor([row.frequency for row in rows], dtype=torch.float32),
            torch.tensor([len(row.prompt) for row in rows]),
        ) if penalized else None,
        bias=SparseBias(
            torch.tensor([i for i, _, _ in bias]),
            torch.tensor([token for _, token, _ in bias]),
            torch.tensor([value for _, _, value in bias], dtype=torch.float32),
        ) if bias else None,
        bad_words=BadWords(
            torch.tensor([i for i, _ in words]),
            torch.tensor([[-1] * (width + 1 - len(w)) + w[:-1] for _, w in words]).long().view(len(words), width),
            torch.tensor([len(word) - 1 for _, word in words]),
            torch.tensor([word[-1] for _, word in words]),
        ) if words else None,
        allowed_NW=torch.from_numpy(mask) if any(row.allowed is not None for row in rows) else None,
    )  # fmt: skip


def by_definition(logits: list[float], row: Row) -> list[float]:
    """One row, token by token, in float64."""
    history, count = row.prompt + row.output, Counter(row.output)
    result = []
    for token, x in enumerate(logits):
        if token in history:
            x = x / row.repetition if x > 0 else x * row.repetition
        x -= row.frequency * count[token] + (row.presence if token in count else 0.0)
        x += sum(value for biased, value in row.bias if biased == token)
        for word in row.bad_words:
            prefix = word[:-1]
            if word[-1] == token and history[len(history) - len(prefix) :] == prefix and len(prefix) <= len(history):
                x = -math.inf
        if row.allowed is not None and token not in row.allowed:
            x = -math.inf
        result.append(x)
    return result


FEW = st.integers(0, 4)  # so that histories repeat themselves and bad words meet them
TOKENS = st.one_of(FEW, st.integers(0, V - 1))
ROWS = st.builds(
    Row,
    prompt=st.lists(TOKENS, min_size=1, max_size=6),
    output=st.lists(TOKENS, max_size=6),
    repetition=st.sampled_from([1.0, 1.0, 1.3, 0.5]),
    presence=st.sampled_from([0.0, 0.0, 0.7, -2.0]),
    frequency=st.sampled_from([0.0, 0.0, 0.3, -0.1]),
    bias=st.lists(st.tuples(TOKENS, st.sampled_from([-1.5, 2.0, 100.0, -math.inf])), max_size=3),
    bad_words=st.lists(st.lists(FEW, min_size=1, max_size=4), max_size=3),
    allowed=st.one_of(st.none(), st.frozensets(st.integers(0, V - 1), min_size=1)),
)


def logits_of(seed: int, n: int) -> torch.Tensor:
    return torch.randn(n, V, generator=torch.Generator().manual_seed(seed)) * 3


@settings(deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=5), st.integers(0, 2**32), st.sampled_from([torch.int32, torch.int64]))
def test_logits_are_processed_by_definition(rows: list[Row], seed: int, dtype: torch.dtype) -> None:
    logits = logits_of(seed, len(rows))
    before = logits.clone()
    processed = process_logits(logits, make_batch(rows, dtype))
    assert torch.equal(logits, before)
    expected = [by_definition(x, row) for x, row in zip(logits.tolist(), rows, strict=True)]
    torch.testing.assert_close(processed, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    for i, row in enumerate(rows):
        assert torch.equal(process_logits(logits[i : i + 1], make_batch([row], dtype)), processed[i : i + 1])


def test_nothing_to_do_costs_nothing() -> None:
    logits = logits_of(0, 3)
    assert process_logits(logits, make_batch([Row()] * 3)) is logits
    assert process_logits(logits.bfloat16(), make_batch([Row()] * 3)).dtype == torch.float32


def test_penalties_tell_the_prompt_from_the_output() -> None:
    logits = torch.full((1, V), 2.0)
    row = Row(prompt=[5, 5, 6], output=[6, 7, 7], repetition=2.0, presence=0.5, frequency=0.25)
    assert process_logits(logits, make_batch([row]))[0, [4, 5, 6, 7]].tolist() == [2.0, 1.0, 0.25, 0.0]
    assert process_logits(-logits, make_batch([row]))[0, [4, 5, 6, 7]].tolist() == [-2.0, -4.0, -4.75, -5.0]


def test_a_bad_word_needs_its_whole_prefix() -> None:
    rows = [
        Row([3, 1, 2], bad_words=[[1, 2, 9]]),
        Row([1, 3, 2], bad_words=[[1, 2, 9], [2, 8]]),
        Row([2], bad_words=[[1, 2, 9], [2, 2, 8]]),  # the prefix is longer than the history
        Row([4], bad_words=[[7]]),
        Row([4]),
    ]
    processed = process_logits(torch.zeros(5, V), make_batch(rows))
    assert [(x == -torch.inf).nonzero().flatten().tolist() for x in processed] == [[9], [8], [], [7], []]


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 64, 100])
def test_every_bit_of_the_mask_is_one_token(vocab_size: int) -> None:
    words = (vocab_size + 31) // 32
    mask = np.zeros((vocab_size, words), dtype=np.uint32)
    for v in range(vocab_size):
        mask[v, v // 32] = 1 << (v % 32)
    batch = dataclasses.replace(make_batch([Row()] * vocab_size), allowed_NW=torch.from_numpy(mask.view(np.int32)))
    processed = process_logits(torch.zeros(vocab_size, vocab_size), batch)
    assert torch.equal(processed == 0, torch.eye(vocab_size, dtype=torch.bool))


def test_a_bias_beyond_float32_stays_a_number() -> None:
    rows = [Row(bias=[(2, 1e300), (3, -1e300)])]
    processed = process_logits(torch.zeros(1, V), make_batch(rows))
    assert processed[0, 2] == torch.finfo(torch.float32).max
    assert processed[0, 3] == -torch.inf


@given(st.integers(0, 2**32), st.integers(1, V), st.booleans())
def test_logprobs_are_of_the_softmax(seed: int, k: int, ties: bool) -> None:
    logits = logits_of(seed, 4).round() if ties else logits_of(seed, 4)
    logits[2, 5], logits[2, 3] = 0.0, -0.0  # equals
    logits[3, 1::2] = -torch.inf
    exact = logits.double().numpy()
    exact = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    values, tokens = top_logprobs(logits, k)
    expected = [sorted(range(V), key=lambda v, row=row: (-row[v], v))[:k] for row in logits.tolist()]  # type: ignore[misc]
    assert tokens.tolist() == expected
    assert (values.dtype, tokens.dtype) == (torch.float32, torch.int64)
    np.testing.assert_allclose(values.numpy(), np.take_along_axis(exact, tokens.numpy(), 1), rtol=1e-5, atol=1e-5)
    assert torch.equal(token_logprobs(logits, tokens[:, -1]), values[:, -1])
    alone, alone_tokens = top_logprobs(logits[1:2], k)
    assert torch.equal(alone, values[1:2])
    assert torch.equal(alone_tokens, tokens[1:2])
    with pytest.MonkeyPatch.context() as patch:  # a few rows at a time, as where there are many
        patch.setattr("tpserve.model.logits._MAX_LOGITS", 3 * V)
        assert all(torch.equal(a, b) for a, b in zip(top_logprobs(logits, k), (values, tokens), strict=True))
        assert torch.equal(token_logprobs(logits, tokens[:, -1]), values[:, -1])

"""Sampling: the draws against a plain reading of each control's definition.

Shape suffixes: N rows of the batch, V vocabulary, K reset ids.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.draws import Row, logits_of, make_batch
from tpserve.model.sampling import next_top_p, sample, sample_batch, uniform

V = 150  # more than a block of the search, and no multiple of one


def probabilities(logits: list[float], row: Row) -> list[float]:
    """What `row` makes of the softmax, by definition: token by token, in float64."""
    scaled = [x / float(np.float32(row.temperature)) for x in logits]
    best = max(scaled)
    mass = [math.exp(x - best) for x in scaled]
    mass = [m if m >= row.min_p * max(mass) else 0.0 for m in mass]
    ranked = sorted(range(len(mass)), key=lambda v: (-logits[v], v))
    kept = ranked[: row.top_k or len(ranked)]
    total = sum(mass[v] for v in kept)
    nucleus: list[int] = []
    for token in kept:
        if nucleus and sum(mass[v] for v in nucleus) >= row.top_p * total:
            break
        nucleus.append(token)
    total = sum(mass[v] for v in nucleus)
    return [mass[v] / total if v in nucleus else 0.0 for v in range(len(mass))]


def possible_draws(logits: list[float], row: Row, u: float) -> set[int]:
    """The token, or the tokens if rounding in float32 may decide between several."""
    if row.temperature == 0:
        return {logits.index(max(logits))}
    tokens: set[int] = set()
    for a, b in itertools.product((1 - 1e-6, 1 + 1e-6), repeat=2):
        top_p = row.top_p * a if row.top_p < 1 else 1.0
        probs = probabilities(logits, dataclasses.replace(row, top_p=top_p, min_p=min(1.0, row.min_p * b)))
        for shifted in (max(u - 1e-5, 0.0), u, u + 1e-5):
            running = list(itertools.accumulate(probs))
            below = [v for v, p in enumerate(probs) if p and running[v] <= shifted]
            above = [v for v, p in enumerate(probs) if p and running[v] > shifted]
            tokens.add(above[0] if above else below[-1])
    return tokens


ROWS = st.builds(
    Row,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 5, 40, 128, V]),
    top_p=st.sampled_from([1.0, 1.0, 0.0, 1e-9, 0.3, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**31),
)


@settings(deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=6), st.integers(0, 2**32), st.booleans(), st.booleans())
def test_draws_are_by_definition(rows: list[Row], seed: int, ties: bool, bounded: bool) -> None:
    logits = logits_of(seed, (len(rows), V), ties)
    batch = make_batch(rows, bounded=bounded)
    numbers = uniform(batch.seed_N, batch.position_N).tolist()
    tokens = sample(logits, batch).tolist()
    for token, values, row, u in zip(tokens, logits.tolist(), rows, numbers, strict=True):
        assert token in possible_draws(values, row, u)


@settings(deadline=None)
@given(st.lists(ROWS, min_size=2, max_size=12), st.integers(0, 2**32), st.booleans(), st.integers(0, 2))
def test_a_row_alone_is_a_row_in_a_batch(rows: list[Row], seed: int, ties: bool, banned: int) -> None:
    logits = logits_of(seed, (len(rows), V), ties)
    logits[:, seed % 7 :: 7][:, : banned * 9] = -torch.inf
    together = sample(logits, make_batch(rows, bounded=True)).tolist()
    assert together == sample(logits, make_batch(rows, bounded=False)).tolist()
    for i, row in enumerate(rows):
        for bounded in (False, True):
            assert sample(logits[i : i + 1], make_batch([row], bounded=bounded)).tolist() == [together[i]]


@settings(deadline=None)
@given(
    st.lists(ROWS, min_size=1, max_size=5), st.integers(0, 2**32), st.sampled_from([0.01, 1.0, 3.0]), st.booleans(),
    st.integers(0, 2), st.sampled_from([1, 2, V, 3000]), st.booleans(),
)  # fmt: skip
def test_rows_together_draw_what_each_draws_alone(
    rows: list[Row], seed: int, scale: float, ties: bool, banned: int, vocab_size: int, bounded: bool
) -> None:
    """The same function twice: of a batch by torch, which GPUs may do, and of a row, which a CPU does."""
    logits = logits_of(seed, (len(rows), vocab_size), ties) * scale
    logits[:, seed % 7 :: 7][:, : banned * 9] = -torch.inf
    batch = make_batch(rows, vocab_size, bounded=bounded)
    assert sample_batch(logits, batch).tolist() == sample(logits, batch).tolist()


def test_what_is_not_a_number_draws_some_token() -> None:
    logits = torch.randn(3, 500)
    logits[0] = torch.nan
    logits[1, 7] = torch.inf
    logits[2, 3] = torch.nan
    for row in (Row(), Row(top_p=0.9), Row(top_k=5), Row(top_k=5, top_p=0.5), Row(min_p=0.5)):
        for way in (sample, sample_batch):
            assert all(0 <= token < 500 for token in way(logits, make_batch([row] * 3, 500)).tolist())


def test_rows_of_any_size_and_place_get_the_same_draws() -> None:
    """Odd lengths: a row then starts, and ends, elsewhere in a vector of the processor than the same row alone."""
    for vocab_size in (1, 2, 31, 127, 128, 129, 1001):
        logits = logits_of(vocab_size, (17, vocab_size))
        rows = [Row(seed=i, top_p=0.8 if i % 2 else 1.0, min_p=0.01 * i) for i in range(17)]
        together = sample(logits, make_batch(rows, vocab_size)).tolist()
        alone = [sample(logits[i : i + 1], make_batch([rows[i]], vocab_size)).item() for i in range(17)]
        assert together == alone


def test_exp_is_one_function_in_every_lane() -> None:
    """The premise of `_weights`: a vector's tail must not be computed otherwise than its body."""
    x = -60 * torch.rand(3000, generator=torch.Generator().manual_seed(0))
    alone = torch.stack([value.exp() for value in x.unbind()])
    for start, size in itertools.product(range(4), [*range(1, 66), 2049, 2990]):
        assert torch.equal(x[start : start + size].exp(), alone[start : start + size])


@pytest.mark.parametrize("bounded", [False, True])
def test_top_k_keeps_the_lower_ids_of_equals(bounded: bool) -> None:
    logits = torch.zeros(1, V)
    logits[0, [20, 140]] = 1.0
    logits[0, 30] = -1.0
    n = 2000
    rows = [Row(seed=i, top_k=6) for i in range(n)]
    assert set(sample(logits.expand(n, V), make_batch(rows, bounded=bounded)).tolist()) == {0, 1, 2, 3, 20, 140}


def test_top_p_keeps_the_lower_ids_of_equals() -> None:
    rows = [Row(seed=i, top_p=0.5) for i in range(500)]
    assert set(sample(torch.zeros(500, 8), make_batch(rows, 8)).tolist()) == {0, 1, 2, 3}
    rows = [Row(seed=i, top_p=0.5 + 2**-47) for i in range(500)]
    assert set(sample(torch.zeros(500, 2), make_batch(rows, 2)).tolist()) == {0, 1}


def test_candidates_bound_only_rows_with_filters() -> None:
    rows = [Row(seed=i, top_k=0 if i else 3) for i in range(500)]
    batch = make_batch(rows, 1000, bounded=True)
    assert batch.max_top_k == 3
    tokens = sample(torch.zeros(500, 1000), batch)
    assert tokens[0] < 3
    assert tokens.max() > 900


def test_top_p_is_of_what_top_k_leaves() -> None:
    logits = torch.tensor([0.4, 0.2, 0.2, 0.1, 0.1]).log().expand(500, 5)
    # Of the first three, the first has half: alone enough for 0.45 of them, though not of all.
    rows = [Row(seed=i, top_k=3, top_p=0.45) for i in range(500)]
    assert set(sample(logits, make_batch(rows, 5)).tolist()) == {0}
    rows = [Row(seed=i, top_p=0.45) for i in range(500)]
    assert set(sample(logits, make_batch(rows, 5)).tolist()) == {0, 1}


def test_min_p_is_after_temperature() -> None:
    logits = torch.tensor([0.0, -1.0, -2.0]).expand(2000, 3)
    warm = [Row(seed=i, temperature=2.0, min_p=0.36) for i in range(2000)]  # exp(-2 / 2) = 0.368
    assert set(sample(logits, make_batch(warm, 3)).tolist()) == {0, 1, 2}
    assert set(sample(logits, make_batch([dataclasses.replace(r, temperature=1.0) for r in warm], 3)).tolist()) == {
        0,
        1,
    }


@pytest.mark.parametrize("row", [Row(temperature=0.7), Row(1.2, top_k=20, top_p=0.9, min_p=0.05)])
def test_draws_follow_the_distribution(row: Row) -> None:
    n, logits = 40000, logits_of(0, (V,)) / 2
    tokens = sample(logits.expand(n, V), make_batch([dataclasses.replace(row, seed=i) for i in range(n)]))
    expected = torch.tensor(probabilities(logits.tolist(), row)) * n
    counts = torch.bincount(tokens, minlength=V)
    assert not counts[expected == 0].any()
    kept = expected > 0
    statistic = (((counts - expected) ** 2)[kept] / expected[kept]).sum().item()
    degrees = int(kept.sum()) - 1
    assert degrees > 5
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)  # five standard deviations of chi-square


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = torch.zeros(3, V)
    logits[1, [9, 99]] = 2.0
    logits[2] = -torch.inf
    for rows in ([Row(0.0)] * 3, [Row(0.0), Row(0.0), Row(1.0)]):
        assert sample(logits, make_batch(rows)).tolist() == [0, 9, 0]


@pytest.mark.parametrize("num_rows", [1, 2, 65])
@pytest.mark.parametrize("vocab_size", [640, 32000, 515])
def test_greedy_is_argmax_in_any_batch(num_rows: int, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    logits = torch.randint(0, 40, (num_rows, vocab_size), generator=generator).float()  # many equals
    for special in (None, -math.inf, math.nan):
        if special is not None:
            logits[0, torch.randint(vocab_size, (5,), generator=generator)] = special
        tokens = sample(logits, make_batch([Row(0.0)] * num_rows, vocab_size))
        assert torch.equal(tokens, logits.argmax(dim=-1))
    logits[-1] = -math.inf
    assert sample(logits, make_batch([Row(0.0)] * num_rows, vocab_size))[-1] == 0


@pytest.mark.parametrize(
    "row", [Row(), Row(top_k=3), Row(top_p=1e-300), Row(top_p=0.0), Row(min_p=1.0), Row(1e-42), Row(100.0, top_k=V)]
)
def test_extremes_draw_only_what_is_allowed(row: Row) -> None:
    n = 300
    logits = torch.full((n, V), -torch.inf)
    logits[:, [50, 149]] = torch.tensor([-1e4, 1e4])
    logits[0] = -torch.inf
    tokens = sample(logits, make_batch([dataclasses.replace(row, seed=i) for i in range(n)])).tolist()
    assert tokens[0] == 0  # nothing is allowed
    assert set(tokens[1:]) == {149}


@pytest.mark.parametrize("vocab_size", [1, 3, V])
def test_nan_stays_inside_the_vocabulary(vocab_size: int) -> None:
    logits = torch.full((2, vocab_size), torch.nan)
    logits[1] = 0.0
    for rows in ([Row()] * 2, [Row(top_k=4)] * 2, [Row(top_p=0.5, min_p=0.1)] * 2):
        together = sample(logits, make_batch(rows, vocab_size))
        assert 0 <= together.min() <= together.max() < vocab_size
        assert together[1] == sample(logits[1:], make_batch(rows[1:], vocab_size))[0]


def test_nearly_equal_logits_that_change_places_keep_the_token() -> None:
    logits = torch.zeros(2, V)
    logits[0, 3], logits[0, 30] = 2.0, 2.0000002
    logits[1, 3], logits[1, 30] = 2.0000002, 2.0
    for seed in range(300):
        a, b = sample(logits, make_batch([Row(seed=seed)] * 2)).tolist()
        assert a == b


def test_next_top_p_is_a_loop_in_python() -> None:
    rng = random.Random(0)
    n, k = 9, 3
    first = [rng.uniform(0.1, 1.0) for _ in range(n)]
    decay = [1.0, *(rng.uniform(0.7, 0.999) for _ in range(n - 1))]
    low = [0.0 if i < 5 else rng.uniform(0.0, first[i]) for i in range(n)]
    reset = [[rng.randrange(60) if j < i % (k + 1) else -1 for j in range(k)] for i in range(n)]
    first_N, decay_N, min_N = (torch.tensor(x, dtype=torch.float64) for x in (first, decay, low))
    top_p, top_p_N = list(first), first_N
    seen: set[tuple[int, str]] = set()
    for _ in range(1000):
        tokens = [rng.randrange(60) for _ in range(n)]
        top_p_N = next_top_p(top_p_N, torch.tensor(tokens), first_N, decay_N, min_N, torch.tensor(reset))
        for i, token in enumerate(tokens):
            if token in reset[i]:
                top_p[i] = first[i]
                seen.add((i, "reset"))
            else:
                top_p[i] = max(top_p[i] * decay[i], low[i])
                seen.add((i, "minimum" if top_p[i] == low[i] else "decay"))
        assert top_p_N.dtype == torch.float64
        assert top_p_N.tolist() == top_p
    assert {"reset", "decay", "minimum"} == {kind for _, kind in seen}


def test_uniform_is_uniform_over_seeds_and_positions() -> None:
    n = 20000
    for u in (uniform(torch.arange(n), torch.full((n,), 3)), uniform(torch.full((n,), -5), torch.arange(n))):
        assert 0 <= u.min() < u.max() < 1
        counts = torch.histc(u, bins=20, min=0, max=1)
        assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 50  # chi-square, 19 degrees of freedom: p < 1e-4

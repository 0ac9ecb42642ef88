"""Draws by kernels are those of `sampling.sample`, token by token."""

from __future__ import annotations

import random

import pytest
import torch

from tests.gpu.conftest import SEED
from tests.helpers.draws import Row, make_batch
from tpserve.model.sampling import sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]
KINDS = ("even", "flat", "peaked", "equal", "banned", "constant")


def logits_of(kind: str, n: int, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(n, vocab_size, device="cuda", generator=generator)
    if kind == "flat":
        return x * 0.02
    if kind == "peaked":
        return x * 8
    if kind == "equal":  # many of each
        return (x * 3).round() / 2
    if kind == "banned":
        x[:, ::3] = -torch.inf
        x[0] = -torch.inf
        return x * 2
    if kind == "constant":
        x[:] = -0.0
        x[:, vocab_size // 2] = 0.0
    return x


def rows_of(rng: random.Random, n: int) -> list[Row]:
    return [
        Row(
            temperature=rng.choice([0.0, 0.3, 0.6, 1.0, 1.7]),
            top_k=rng.choice([0, 0, 0, 1, 5, 50, 1000]),
            top_p=rng.choice([1.0, 1.0, 0.0, 1e-9, 0.3, 0.9, 0.999]),
            min_p=rng.choice([0.0, 0.0, 0.02, 0.5, 1.0]),
            seed=rng.getrandbits(64),
            position=rng.randrange(60),
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize("vocab_size", [5, 515, 32000, 128256])
@pytest.mark.parametrize("kind", KINDS)
def test_random_draws(kind: str, vocab_size: int) -> None:
    from tpserve.model.kernels.draw import GreedyDraws
    from tpserve.model.kernels.random_draw import RandomDraws

    generator, rng = torch.Generator("cuda").manual_seed(SEED), random.Random(SEED)
    tokens_RL = torch.zeros(100, 60, dtype=torch.int64, device="cuda")
    greedy, draws = GreedyDraws(64, tokens_RL), RandomDraws(4, vocab_size, tokens_RL)
    for n in (1, 3, 64, 8, 100, 1):
        logits = logits_of(kind, n, vocab_size, generator)
        batch = make_batch(rows_of(rng, n), vocab_size, device="cuda")
        rows_N = torch.randperm(100, device="cuda", generator=generator)[:n]
        expected = sample(logits, batch)
        written = torch.zeros_like(tokens_RL)
        written[rows_N, batch.position_N] = expected
        for drawn in (greedy if n <= 64 else None, None):
            tokens_RL.zero_()
            if drawn is not None:
                drawn(logits, rows_N, batch.position_N)
            assert draws(logits, batch, rows_N, drawn).tolist() == expected.tolist()
            assert torch.equal(tokens_RL, written)


@pytest.mark.parametrize("vocab_size", [515, 32000])
def test_draws_of_one_row_are_as_probable_as_they_should_be(vocab_size: int) -> None:
    """Against float64, not `sample`: 20,000 draws of one distribution, top_p and top_k on."""
    from tpserve.model.kernels.random_draw import RandomDraws

    n, row = 20_000, Row(temperature=0.7, top_k=40, top_p=0.9)
    tokens_RL = torch.zeros(1, n, dtype=torch.int64, device="cuda")
    # Not far apart, lest one token have all of top_p.
    logits_V = torch.randn(vocab_size, device="cuda", generator=torch.Generator("cuda").manual_seed(SEED))
    batch = make_batch(
        [Row(row.temperature, row.top_k, row.top_p, seed=i) for i in range(n)], vocab_size, device="cuda"
    )
    draws = RandomDraws(n, vocab_size, tokens_RL)
    tokens_N = draws(logits_V.expand(n, -1).contiguous(), batch, torch.zeros(n, dtype=torch.int64, device="cuda"))
    top = (logits_V.double() / row.temperature).topk(row.top_k)
    probabilities = top.values.softmax(-1)
    probabilities[(probabilities.cumsum(-1) - probabilities) >= row.top_p] = 0
    probabilities /= probabilities.sum()
    found = (tokens_N[:, None] == top.indices[None, :]).sum(0)
    assert found.sum() == n
    assert not found[probabilities == 0].any()
    likely = probabilities * n > 5
    chi = ((found - probabilities * n) ** 2 / (probabilities * n))[likely].sum().item()
    freedom = int(likely.sum()) - 1
    assert freedom >= 5
    assert chi < freedom + 6 * (2 * freedom) ** 0.5  # six standard deviations


def test_what_is_not_a_number_draws_some_token() -> None:
    from tpserve.model.kernels.random_draw import RandomDraws

    V = 5000
    tokens_RL = torch.zeros(4, 8, dtype=torch.int64, device="cuda")
    draws = RandomDraws(4, V, tokens_RL)
    logits = torch.randn(3, V, device="cuda")
    logits[0] = torch.nan
    logits[1, 7] = torch.inf
    rows_N = torch.arange(3, device="cuda")
    bad = make_batch([Row(top_p=0.9), Row(top_k=5), Row(top_p=0.9, seed=5)], V, device="cuda")
    tokens = draws(logits, bad, rows_N)
    assert ((tokens >= 0) & (tokens < V)).all()
    good = make_batch([Row(top_p=0.9), Row(top_k=5), Row(top_p=0.5, seed=5)], V, device="cuda")
    logits = torch.randn(3, V, device="cuda")
    assert draws(logits, good, rows_N).tolist() == sample(logits, good).tolist()  # nothing is left of the last call

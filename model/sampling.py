"""From logits to tokens, vectorised over the batch. A token is a function of (seed, position, logits) alone.

Probabilities are unnormalised integers ("weights"): 2**44 for a row's most probable token. Sums of integers do not
depend on the order of summation, so that a row's token is the same alone and in any batch, on any number of threads,
and under any algorithm that the device picks for a shape; a float's running sum on CUDA differs even from run to run.
Below 2**-44 of the most probable token's probability a token is never drawn: over a vocabulary of 2**18 that is less
than 2**-26 of the mass in all.

Shape suffixes: N rows of the batch, V vocabulary, P vocabulary in whole blocks, C blocks, S tokens of a block,
K candidates or reset ids, X any of those, R rounds.

Nothing here waits for a GPU: no shape depends on data.
"""

from __future__ import annotations

import torch

from tpserve.model import philox
from tpserve.model.logits import (
    BadWords,
    Penalties,
    SamplingBatch,
    SparseBias,
    process_logits,
    token_logprobs,
    top_logprobs,
)
from tpserve.model.sample_row import ONE, sample_row

__all__ = [
    "BadWords",
    "Penalties",
    "SamplingBatch",
    "SparseBias",
    "argmax",
    "draw",
    "draw_greedy",
    "next_top_p",
    "philox4x32",
    "process_logits",
    "sample",
    "sample_batch",
    "token_logprobs",
    "top_logprobs",
    "uniform",
]

_MAX_VOCAB = 2**18  # the sum of so many weights is at most 2**62
_BLOCK = 128


def sample(logits_NV: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Draws one token a row: temperature, min_p, top_k, top_p on what is left, the draw; on a CPU row by row.

    Args:
        logits_NV: float32 logits, from `process_logits`; at most 2**18 a row.
        batch: the rows' parameters.

    Returns:
        int64 [N]; greedy rows: the most probable token, of equals the lowest id.
    """
    if not batch.any_random:
        return argmax(logits_NV)
    if logits_NV.device.type != "cpu":
        return sample_batch(logits_NV, batch)
    b = batch
    columns = (b.temperature_N, b.top_k_N, b.top_p_N, b.min_p_N, b.seed_N, b.position_N)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return torch.tensor([sample_row(logits_V, *row) for logits_V, row in zip(logits_NV, rows, strict=True)])


def sample_batch(logits_NV: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """As `sample`, of all rows together.

    A random row is drawn by inverting the cumulative distribution in vocabulary order, not in order of probability:
    two nearly equal logits that change places under another summation order then do not change the token.
    A logit of -inf is never drawn, except that a row of nothing else gives token 0.

    Args:
        logits_NV: float32 logits, from `process_logits`; at most 2**18 a row.
        batch: the rows' parameters.

    Returns:
        int64 [N]; greedy rows: the most probable token, of equals the lowest id.
    """
    vocab_size = logits_NV.shape[1]
    assert vocab_size <= _MAX_VOCAB
    max_N, greedy_N = logits_NV.max(dim=-1)
    logits_NP = torch.nn.functional.pad(logits_NV, (0, -vocab_size % _BLOCK), value=-torch.inf)
    max_N1 = max_N[:, None].clamp(min=torch.finfo(torch.float32).min)  # -inf less -inf would be NaN
    weight_NP = _weights(logits_NP, max_N1, batch)
    if batch.any_filter:
        weight_NP.masked_fill_(_filtered(logits_NP, max_N1, batch, vocab_size), 0)
    total_N = weight_NP.sum(dim=-1)
    target_N = (uniform(batch.seed_N, batch.position_N) * total_N.double()).long()
    target_N = torch.minimum(target_N, total_N - 1)  # the product may be rounded up; so it can never leave the row
    drawn_N = _search(weight_NP, target_N).clamp_(0, vocab_size - 1)  # the clamp is for logits that are NaN
    return torch.where(batch.temperature_N > 0, drawn_N, greedy_N)


def argmax(logits_NV: torch.Tensor) -> torch.Tensor:
    """As `Tensor.argmax(-1)`; on a CPU by numpy, which compares many numbers at a time, where torch compares one."""
    if logits_NV.device.type != "cpu":
        return logits_NV.argmax(dim=-1)
    return torch.from_numpy(logits_NV.numpy().argmax(axis=-1))


def draw(logits_NV: torch.Tensor, batch: SamplingBatch, rows_N: torch.Tensor, tokens_RL: torch.Tensor) -> torch.Tensor:
    """Writes `sample`'s tokens into the rows, at the batch's positions, and returns them."""
    tokens_N = sample(logits_NV, batch)
    tokens_RL[rows_N, batch.position_N] = tokens_N
    return tokens_N


def draw_greedy(
    logits_NV: torch.Tensor, rows_N: torch.Tensor, positions_N: torch.Tensor, tokens_RL: torch.Tensor
) -> torch.Tensor:
    """Writes the most probable tokens into the rows, at those positions, and returns them; see `argmax`."""
    tokens_N = argmax(logits_NV)
    tokens_RL[rows_N, positions_N] = tokens_N
    return tokens_N


def _weights(logits_NX: torch.Tensor, max_N1: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Probabilities relative to the row's highest, in units of 2**-44; 0 below min_p. int64 [N, X].

    float32 is exact enough for a single probability (the logit's own rounding weighs more), though not for their sums.
    Equal logits get equal weights wherever they stand: no step but exp is inexact beyond IEEE's rounding, and exp
    is the same function in every lane, which a test makes sure of. For that reason min_p is compared with
    probabilities: log(min_p) would be one more such function.
    """
    # The maximum is taken off before the division: a temperature near 0 then gives -inf, not inf - inf.
    temperature_N1 = torch.where(batch.temperature_N > 0, batch.temperature_N, 1.0)[:, None]
    relative_NX = (logits_NX - max_N1).div_(temperature_N1).exp_()
    if batch.any_min_p:
        relative_NX.masked_fill_(relative_NX < batch.min_p_N[:, None], 0.0)
    return relative_NX.mul_(ONE).long()


def _filtered(logits_NP: torch.Tensor, max_N1: torch.Tensor, batch: SamplingBatch, vocab_size: int) -> torch.Tensor:
    """What top-k, then top-p on what is left (Holtzman et al., 2020) leave out; bool [N, P].

    A token is kept while those before it, in order of logit and then of id, have less than top_p of the mass; the
    first always is. Only values are sorted: how many are kept gives the last kept logit and how many of those equal
    to it.
    """
    if batch.max_top_k is None:
        sorted_NK = logits_NP.sort(dim=-1, descending=True).values
    else:
        num_candidates = min(batch.max_top_k + -batch.max_top_k % _BLOCK, logits_NP.shape[1])
        sorted_NK = logits_NP.topk(num_candidates, dim=-1).values
    rank_K = torch.arange(sorted_NK.shape[1], device=logits_NP.device)
    weight_NK = _weights(sorted_NK, max_N1, batch).masked_fill_(rank_K >= batch.top_k_N[:, None], 0)
    total_N = weight_NK.sum(dim=-1)
    limit_N = torch.minimum((batch.top_p_N * total_N.double()).ceil().long(), total_N)
    last_N1 = _search(weight_NK, limit_N - 1).clamp_(max=rank_K.shape[0] - 1)[:, None]  # the clamp: see sample
    last_logit_N1 = sorted_NK.gather(-1, last_N1)
    num_equal_N = last_N1.squeeze(-1) + 1 - (sorted_NK > last_logit_N1).sum(dim=-1)
    # A row without filters may keep more than the candidates.
    unfiltered_N1 = ((batch.top_k_N >= vocab_size) & (batch.top_p_N >= 1.0))[:, None]
    last_logit_N1.masked_fill_(unfiltered_N1, -torch.inf)
    equal_NP = logits_NP == last_logit_N1
    last_id_N = _search(equal_NP, num_equal_N - 1)
    id_P = torch.arange(logits_NP.shape[1], device=logits_NP.device)
    return (logits_NP < last_logit_N1).logical_or_(equal_NP.logical_and_(id_P > last_id_N[:, None]))


def _search(weight_NP: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """The first place in each row whose running sum exceeds the target; int64 [N].

    Sums of blocks come first, so that no running sum over the vocabulary is written.
    """
    weight_NCS = weight_NP.view(weight_NP.shape[0], -1, _BLOCK)
    sum_NC = weight_NCS.sum(dim=-1).cumsum(dim=-1)
    block_N1 = torch.searchsorted(sum_NC, target_N[:, None], right=True).clamp_(max=sum_NC.shape[1] - 1)
    index_N1S = block_N1[:, :, None].expand(-1, -1, _BLOCK)
    sum_NS = weight_NCS.gather(1, index_N1S).squeeze(1).cumsum(dim=-1)
    before_N1 = sum_NC.gather(1, block_N1) - sum_NS[:, -1:]
    place_N1 = torch.searchsorted(sum_NS, target_N[:, None] - before_N1, right=True)
    return (block_N1 * _BLOCK + place_N1).squeeze(-1)


def next_top_p(
    top_p_N: torch.Tensor,
    tokens_N: torch.Tensor,
    first_N: torch.Tensor,
    decay_N: torch.Tensor,
    min_N: torch.Tensor,
    reset_NK: torch.Tensor,
) -> torch.Tensor:
    """Each row's top_p after a token (Lee et al., "Factuality Enhanced Language Models", 2022).

    One multiplication and a maximum in float64: a loop over a sequence's tokens in Python's floats gives the same
    bits, which is how the state of a sequence is restored that lost its row.

    Args:
        top_p_N: float64, the value that the token was drawn with.
        tokens_N: int64, the token.
        first_N: float64, the request's top_p.
        decay_N: float64; 1: none.
        min_N: float64, decay ends there.
        reset_NK: ids after which top_p is the request's again; -1 fills the row.

    Returns:
        float64 [N].
    """
    reset_N = (tokens_N[:, None] == reset_NK).any(dim=-1)
    return torch.where(reset_N, first_N, torch.maximum(top_p_N * decay_N, min_N))


def uniform(seed_N: torch.Tensor, position_N: torch.Tensor) -> torch.Tensor:
    """A number in [0, 1) for each (seed, position), 53 random bits; float64 [N]."""
    zero_N = torch.zeros_like(seed_N)
    even_2N, odd_2N = philox4x32(
        torch.stack((position_N, zero_N)),
        torch.stack((position_N >> 32, zero_N + philox.DRAW)),
        torch.stack((seed_N, seed_N >> 32)),
    )
    mantissa_N = ((even_2N[0] >> 5) << 26) | (odd_2N[0] >> 6)
    return mantissa_N.double() * 2.0**-53


def philox4x32(even_2N: torch.Tensor, odd_2N: torch.Tensor, key_2N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Philox4x32-10 for tensors, as `philox.philox4x32` has it for integers.

    Six operations a round: on a GPU their launches are most of what a draw costs.

    Args:
        even_2N: int64, words 0 and 2 of the counters; only the lower 32 bits count, here and below.
        odd_2N: words 1 and 3.
        key_2N: words 0 and 1 of the keys.

    Returns:
        (words 0 and 2, words 1 and 3), from 0 to 2**32 - 1.
    """
    second_21 = torch.arange(2, device=key_2N.device)[:, None]  # not torch.tensor, which waits for the device
    multiplier_21 = philox.MUL_0 + second_21 * (philox.MUL_1 - philox.MUL_0)
    weyl_21 = philox.WEYL_0 + second_21 * (philox.WEYL_1 - philox.WEYL_0)
    round_R11 = torch.arange(philox.NUM_ROUNDS, device=key_2N.device)[:, None, None]
    even_2N = even_2N & philox.MASK_32
    for round_key_2N in (key_2N + round_R11 * weyl_21).unbind():
        # A product may wrap beyond 2**63, and >> keeps its sign; the 64 bits are still right, and so are these 32.
        product_2N = (even_2N * multiplier_21).flip(0)
        even_2N = (product_2N >> 32).bitwise_xor_(odd_2N).bitwise_xor_(round_key_2N).bitwise_and_(philox.MASK_32)
        odd_2N = product_2N
    return even_2N, odd_2N & philox.MASK_32

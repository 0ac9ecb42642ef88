"""From logits to tokens, vectorised over the batch. A token is a function of (seed, position, logits) alone.

Shape suffixes: N rows of the batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: multipliers and Weyl increments of Philox4x32.
_MUL_0, _MUL_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class SamplingBatch:
    """The sampling parameters of a step's rows, on the device of the logits.

    Attributes:
        temperature_N: float32; 0 means greedy.
        top_k_N: int64; the vocabulary's size means all.
        top_p_N: float32; 1 means all.
        seed_N: int64, the 64 bits of each request's seed.
        position_N: int64, the position in its sequence of the token to be drawn.
        any_random: whether any row has a temperature above 0.
        any_filter: whether any random row has a top_k or top_p.
    """

    temperature_N: torch.Tensor
    top_k_N: torch.Tensor
    top_p_N: torch.Tensor
    seed_N: torch.Tensor
    position_N: torch.Tensor
    any_random: bool
    any_filter: bool


def sample(logits_NV: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Draws one token a row.

    A random row is drawn by inverting the cumulative distribution in vocabulary order, not in order of probability:
    two nearly equal logits that change places under another summation order then do not change the token.

    Args:
        logits_NV: float32 logits.
        batch: the rows' parameters.

    Returns:
        int64 [N].
    """
    greedy_N = logits_NV.argmax(dim=-1)
    if not batch.any_random:
        return greedy_N
    random_N = batch.temperature_N > 0
    scaled_NV = logits_NV / torch.where(random_N, batch.temperature_N, 1.0)[:, None]
    if batch.any_filter:
        scaled_NV = _filter(scaled_NV, batch.top_k_N, batch.top_p_N)
    # float64: in a vocabulary of 128k a float32 running sum is off by more than many a token's probability.
    cumulative_NV = scaled_NV.double().softmax(dim=-1).cumsum(dim=-1)
    target_N = uniform(batch.seed_N, batch.position_N) * cumulative_NV[:, -1]
    drawn_N = torch.searchsorted(cumulative_NV, target_N[:, None], right=True).squeeze(-1)
    drawn_N.clamp_(max=logits_NV.shape[-1] - 1)
    return torch.where(random_N, drawn_N, greedy_N)


def _filter(logits_NV: torch.Tensor, top_k_N: torch.Tensor, top_p_N: torch.Tensor) -> torch.Tensor:
    """Top-k, then top-p on what is left (Holtzman et al., 2020); the rest becomes -inf, the first never does."""
    sorted_NV, order_NV = logits_NV.sort(dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(logits_NV.shape[-1], device=logits_NV.device)
    sorted_NV.masked_fill_(ranks_V >= top_k_N[:, None], -torch.inf)
    probs_NV = sorted_NV.softmax(dim=-1)
    before_NV = probs_NV.cumsum(dim=-1) - probs_NV
    drop_NV = (before_NV >= top_p_N[:, None]) & (top_p_N < 1.0)[:, None]
    drop_NV[:, 0] = False
    sorted_NV.masked_fill_(drop_NV, -torch.inf)
    return torch.full_like(logits_NV, -torch.inf).scatter_(-1, order_NV, sorted_NV)


def token_logprobs(logits_NV: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
    """Natural log-probability of each row's token under softmax of the unmodified logits; float32 [N]."""
    return logits_NV.log_softmax(dim=-1).gather(-1, tokens_N[:, None]).squeeze(-1)


def uniform(seed_N: torch.Tensor, position_N: torch.Tensor) -> torch.Tensor:
    """A number in [0, 1) for each (seed, position), 53 random bits; float64 [N]."""
    zero = torch.zeros_like(seed_N)
    words = philox4x32((position_N & _MASK, _high(position_N), zero, zero), (seed_N & _MASK, _high(seed_N)))
    mantissa = ((words[0] >> 5) << 26) | (words[1] >> 6)
    return mantissa.double() * 2.0**-53


Words2 = tuple[torch.Tensor, torch.Tensor]
Words4 = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words4, key: Words2, rounds: int = 10) -> Words4:
    """The Philox4x32 bijection (Salmon et al., SC 2011, figure 2); every tensor is int64 with values below 2**32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = c0 * _MUL_0, c2 * _MUL_1  # wraps beyond 2**63; the 64 bits are still right
        c0, c1, c2, c3 = (
            _high(product1) ^ c1 ^ k0,
            product1 & _MASK,
            _high(product0) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def _high(x: torch.Tensor) -> torch.Tensor:
    """The upper 32 bits of an int64, as an unsigned number (>> keeps the sign, the mask drops it)."""
    return (x >> 32) & _MASK

"""What is done to logits before a token is chosen, and what is reported of them. Rows never influence each other.

Shape suffixes: N rows of the batch, V vocabulary, L history (a sequence's tokens), W words of the mask or tokens of the
longest bad word's prefix, M entries of the bias, B bad words, K most probable tokens or reset ids.

Nothing here waits for the device: no shape depends on data.
"""

from __future__ import annotations

import dataclasses

import torch

from tpserve.model.philox import MASK_32

_MAX_LOGITS = 1 << 23  # 32 MiB


@dataclasses.dataclass(frozen=True)
class Penalties:
    """Penalties on tokens that a sequence holds already; built only when some row has one.

    Attributes:
        repetition_N: float32; logits of tokens in prompt or output are divided (if positive) or multiplied by it
            (Keskar et al., CTRL, 2019); 1: off.
        presence_N: float32, taken off the logits of tokens in the output; 0: off.
        frequency_N: float32, likewise, times their count; 0: off.
        num_prompt_N: int64; the history before it is prompt, after it output.
    """

    repetition_N: torch.Tensor
    presence_N: torch.Tensor
    frequency_N: torch.Tensor
    num_prompt_N: torch.Tensor


@dataclasses.dataclass(frozen=True)
class SparseBias:
    """Numbers added to single logits; entries for one place add up, and -inf bans.

    Attributes:
        row_M: int64, index into N.
        token_M: int64.
        value_M: float32.
    """

    row_M: torch.Tensor
    token_M: torch.Tensor
    value_M: torch.Tensor


@dataclasses.dataclass(frozen=True)
class BadWords:
    """Token sequences that are never completed: a token is banned where the history ends with what precedes it.

    Attributes:
        row_B: int64, index into N.
        prefix_BW: the sequence without its last token, right-aligned, -1 before it.
        prefix_len_B: int64, its length; 0 bans the token always.
        token_B: int64, the last token.
    """

    row_B: torch.Tensor
    prefix_BW: torch.Tensor
    prefix_len_B: torch.Tensor
    token_B: torch.Tensor


@dataclasses.dataclass(frozen=True)
class SamplingBatch:
    """The sampling parameters of a step's rows, on the device of the logits.

    Attributes:
        temperature_N: float32; 0 means greedy.
        top_k_N: int64; the vocabulary's size means all.
        top_p_N: float64; 1 means all.
        min_p_N: float32; 0 means all.
        seed_N: int64, the 64 bits of each sequence's seed.
        position_N: int64, the position in its sequence of the token to be drawn.
        any_random: whether any row has a temperature above 0.
        any_filter: whether any random row may have a top_k below V or a top_p below 1.
        any_min_p: whether any random row has a min_p.
        history_NL: int32 or int64 ids of each row's sequence, valid before position_N, anything after; None when no
            row has penalties or bad words.
        penalties: None when no row has any, like the fields below.
        bias: see SparseBias.
        bad_words: see BadWords.
        allowed_NW: int32 bitmask; token v may come when bit v % 32 of word v // 32 is set; -1 throughout: all may.
        max_top_k: the largest top_k of the random rows that have a top_k or top_p, when each of them has a top_k: then
            only so many candidates a row are sorted. None: the whole vocabulary is. The tokens are the same.
        largest_top_k: of the random rows' that are below V; 0: none is.
    """

    temperature_N: torch.Tensor
    top_k_N: torch.Tensor
    top_p_N: torch.Tensor
    min_p_N: torch.Tensor
    seed_N: torch.Tensor
    position_N: torch.Tensor
    any_random: bool
    any_filter: bool
    any_min_p: bool
    history_NL: torch.Tensor | None = None
    penalties: Penalties | None = None
    bias: SparseBias | None = None
    bad_words: BadWords | None = None
    allowed_NW: torch.Tensor | None = None
    max_top_k: int | None = None
    largest_top_k: int = 0


def process_logits(logits_NV: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Applies penalties, bias, bad words and the mask, in this order.

    Args:
        logits_NV: the network's logits; not modified, as log-probabilities are of these.
        batch: the rows' parameters.

    Returns:
        float32 [N, V]; the input itself when it is float32 and there is nothing to do.
    """
    logits_NV = logits_NV.float()
    if batch.penalties is not None:
        assert batch.history_NL is not None
        logits_NV = _penalize(logits_NV, batch.penalties, batch.history_NL, batch.position_N)
    if batch.bias is not None:
        # A finite bias may be infinite as float32; downwards that is a ban, upwards it would give NaN when sampled.
        value_M = batch.bias.value_M.clamp(max=torch.finfo(torch.float32).max)
        logits_NV = logits_NV.index_put((batch.bias.row_M, batch.bias.token_M), value_M, accumulate=True)
    if batch.bad_words is not None:
        assert batch.history_NL is not None
        completed_B = _completed(batch.bad_words, batch.history_NL, batch.position_N)
        # Where there is nothing to ban, 0 is added: to choose entries would make their number depend on data.
        ban_B = torch.zeros_like(completed_B, dtype=torch.float32).masked_fill_(completed_B, -torch.inf)
        place = (batch.bad_words.row_B, batch.bad_words.token_B)
        logits_NV = logits_NV.index_put(place, ban_B, accumulate=True)
    if batch.allowed_NW is not None:
        bit_32 = torch.ones(32, dtype=torch.int32, device=logits_NV.device) << torch.arange(
            32, dtype=torch.int32, device=logits_NV.device
        )
        banned_NV = ((batch.allowed_NW[:, :, None] & bit_32) == 0).flatten(1)[:, : logits_NV.shape[1]]
        logits_NV = logits_NV.masked_fill(banned_NV, -torch.inf)
    return logits_NV


def _penalize(
    logits_NV: torch.Tensor, penalties: Penalties, history_NL: torch.Tensor, position_N: torch.Tensor
) -> torch.Tensor:
    place_L = torch.arange(history_NL.shape[1], device=history_NL.device)
    known_NL = place_L < position_N[:, None]
    output_NL = known_NL & (place_L >= penalties.num_prompt_N[:, None])
    token_NL = torch.where(known_NL, history_NL, 0).long()  # what is not history counts as 0 of token 0
    zero_NV = torch.zeros_like(logits_NV, dtype=torch.int32)
    seen_NV = zero_NV.scatter_add(1, token_NL, known_NL.int()) > 0
    count_NV = zero_NV.scatter_add_(1, token_NL, output_NL.int())
    repetition_N1 = penalties.repetition_N[:, None]
    repeated_NV = torch.where(logits_NV > 0, logits_NV / repetition_N1, logits_NV * repetition_N1)
    penalized_NV = torch.where(seen_NV, repeated_NV, logits_NV)
    penalized_NV -= penalties.frequency_N[:, None] * count_NV
    penalized_NV -= penalties.presence_N[:, None] * (count_NV > 0)
    return penalized_NV


def _completed(bad_words: BadWords, history_NL: torch.Tensor, position_N: torch.Tensor) -> torch.Tensor:
    """Whether each bad word's prefix is the end of its row's history; bool [B]."""
    width = bad_words.prefix_BW.shape[1]
    before_W = torch.arange(-width, 0, device=history_NL.device)  # from the token to be drawn
    place_BW = position_N[bad_words.row_B][:, None] + before_W
    history_BW = history_NL[bad_words.row_B[:, None], place_BW.clamp(min=0)]
    same_BW = (history_BW == bad_words.prefix_BW) & (place_BW >= 0)
    return (same_BW | (before_W < -bad_words.prefix_len_B[:, None])).all(dim=-1)


def token_logprobs(logits_NV: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
    """Natural log-probability of each row's token under softmax of the unmodified logits; float32 [N]."""
    return logprobs_of(logits_NV, tokens_N[:, None]).squeeze(-1)


def logprobs_of(logits_NV: torch.Tensor, token_NK: torch.Tensor) -> torch.Tensor:
    """The same of several tokens of each row; float32 [N, K]."""
    return torch.cat(
        [logits_NV[rows].float().log_softmax(dim=-1).gather(-1, token_NK[rows]) for rows in _few_rows(logits_NV)]
    )


def _few_rows(logits_NV: torch.Tensor) -> list[slice]:
    """Some at a time: what is made of logits on the way to log-probabilities takes six times their memory."""
    some = max(1, _MAX_LOGITS // logits_NV.shape[1])
    return [slice(first, first + some) for first in range(0, max(1, len(logits_NV)), some)]


def top_logprobs(logits_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most probable tokens of each row under softmax of the unmodified logits.

    Args:
        logits_NV: the network's logits.
        k: how many; at most V.

    Returns:
        (natural log-probabilities, float32 [N, k]; ids, int64 [N, k]), the most probable first; of equals the lower id.
    """
    token_NK = torch.cat([_top_tokens(logits_NV[rows].float(), k) for rows in _few_rows(logits_NV)])
    return logprobs_of(logits_NV, token_NK), token_NK


def _top_tokens(logits_NV: torch.Tensor, k: int) -> torch.Tensor:
    # topk promises no order among equals. So the search is for integers without equals: a float's bits, in the order of
    # the floats (below zero the bits after the sign count backwards), then the id, backwards.
    bits_NV = (logits_NV + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0, whose equal it is
    order_NV = bits_NV ^ ((bits_NV >> 31) & 0x7FFFFFFF)
    backward_V = MASK_32 - torch.arange(logits_NV.shape[1], device=logits_NV.device)
    key_NK = ((order_NV.long() << 32) | backward_V).topk(k, dim=-1).values
    return MASK_32 - (key_NK & MASK_32)

"""Attention of a flat batch over the paged KV cache, by torch's scaled_dot_product_attention.

Shape suffixes: T tokens of the step, S sequences, L keys of the longest of them, Q queries of one sequence, H query
heads and K key/value heads of this rank, G = H / K, E head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tpserve.model.kv_cache import PagedKVCache


@dataclasses.dataclass(frozen=True)
class SequenceSlice:
    """The part of one sequence that a step computes.

    Attributes:
        num_computed_tokens: tokens whose keys and values are in the cache already.
        num_query_tokens: tokens computed now; they follow the computed ones.
        block_table: the sequence's blocks, enough for both.
    """

    num_computed_tokens: int
    num_query_tokens: int
    block_table: Sequence[int]

    @property
    def seq_len(self) -> int:
        """Tokens in the cache after the step."""
        return self.num_computed_tokens + self.num_query_tokens


@dataclasses.dataclass(frozen=True)
class _Prefill:
    rows: slice  # of the flat batch
    slots_L: torch.Tensor
    mask_QL: torch.Tensor | None  # None: plain causal, nothing was computed before


class PagedAttention:
    """One step's attention; built once a step, called once a layer (it is an `Attend`).

    Sequences with one query token share one batched call over gathered keys, padded to the longest; every longer
    slice is its own call. A padded key is masked, so a sequence's result does not depend on its batch-mates beyond
    float rounding.

    Args:
        cache: where keys and values live.
        slices: the step's sequences in the order of their tokens; those with one query token come first.
    """

    def __init__(self, cache: PagedKVCache, slices: Sequence[SequenceSlice]) -> None:
        self._cache = cache
        device = cache.k[0].device
        tables = [torch.tensor(s.block_table, dtype=torch.int64) for s in slices]
        slots = [_slots(t, cache.block_size, s.seq_len) for t, s in zip(tables, slices, strict=True)]
        self._new_slots_T = torch.cat([t[s.num_computed_tokens :] for t, s in zip(slots, slices, strict=True)]).to(
            device
        )
        self._num_decodes = next((i for i, s in enumerate(slices) if s.num_query_tokens > 1), len(slices))
        if self._num_decodes:
            lengths = torch.tensor([s.seq_len for s in slices[: self._num_decodes]])
            padded_SL = torch.nn.utils.rnn.pad_sequence(slots[: self._num_decodes], batch_first=True)
            mask_SL = torch.arange(padded_SL.shape[1]) < lengths[:, None]
            # A masked key still multiplies its value by 0, and 0 · inf is nan: pad with the sequence's own first slot,
            # never with one that somebody else may have filled.
            self._decode_slots_SL = torch.where(mask_SL, padded_SL, padded_SL[:, :1]).to(device)
            self._decode_mask_S11L = None if bool(mask_SL.all()) else mask_SL[:, None, None].to(device)
        self._prefills: list[_Prefill] = []
        start = self._num_decodes
        for s, slots_L in zip(slices[self._num_decodes :], slots[self._num_decodes :], strict=True):
            assert s.num_query_tokens > 1, "slices with one query token must come first"
            mask_QL = None
            if s.num_computed_tokens:
                queries = torch.arange(s.num_computed_tokens, s.seq_len)
                mask_QL = (torch.arange(s.seq_len) <= queries[:, None]).to(device)
            self._prefills.append(_Prefill(slice(start, start + s.num_query_tokens), slots_L.to(device), mask_QL))
            start += s.num_query_tokens

    def __call__(self, layer: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor) -> torch.Tensor:
        """Writes the step's keys and values, then attends; [T, H, E] in and out."""
        k_cache, v_cache = self._cache.k[layer], self._cache.v[layer]
        k_cache[self._new_slots_T] = k_TKE
        v_cache[self._new_slots_T] = v_TKE
        out_THE = torch.empty_like(q_THE)
        if self._num_decodes:
            rows = slice(0, self._num_decodes)
            out_THE[rows] = self._decode(q_THE[rows], k_cache, v_cache)
        for prefill in self._prefills:
            out_THE[prefill.rows] = _attend_one(q_THE[prefill.rows], k_cache, v_cache, prefill)
        return out_THE

    def _decode(self, q_SHE: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        k_SKLE = k_cache[self._decode_slots_SL].transpose(1, 2)
        v_SKLE = v_cache[self._decode_slots_SL].transpose(1, 2)
        # The G query heads of a key/value head see the same keys: they can stand where queries of a sequence would.
        q_SKGE = q_SHE.view(q_SHE.shape[0], k_SKLE.shape[1], -1, q_SHE.shape[-1])
        out_SKGE = F.scaled_dot_product_attention(q_SKGE, k_SKLE, v_SKLE, attn_mask=self._decode_mask_S11L)
        return out_SKGE.flatten(1, 2)


def _attend_one(q_QHE: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, p: _Prefill) -> torch.Tensor:
    q_HQE = q_QHE.transpose(0, 1)[None]
    k_KLE, v_KLE = k_cache[p.slots_L].transpose(0, 1)[None], v_cache[p.slots_L].transpose(0, 1)[None]
    out = F.scaled_dot_product_attention(
        q_HQE, k_KLE, v_KLE, attn_mask=p.mask_QL, is_causal=p.mask_QL is None, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _slots(block_table: torch.Tensor, block_size: int, n_tokens: int) -> torch.Tensor:
    """The slots of a sequence's first `n_tokens` tokens, int64 [n_tokens]."""
    slots = block_table[:, None] * block_size + torch.arange(block_size)
    return slots.flatten()[:n_tokens]

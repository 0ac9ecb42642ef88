"""Attention of a flat batch over the paged KV cache, by torch's scaled_dot_product_attention.

Shape suffixes: T tokens of the step, S sequences that decode, L keys of the longest of them, Q queries of one
sequence, H query heads and K key/value heads of this rank, G = H / K, E head width, R rows of the batch state,
B blocks of the longest sequence that can be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tpserve.model.kv_cache import PagedKVCache


@dataclasses.dataclass(frozen=True, slots=True)
class SequenceSlice:
    """The part of one sequence that a step computes.

    Attributes:
        num_computed_tokens: tokens whose keys and values are in the cache already.
        num_query_tokens: tokens computed now; they follow the computed ones.
    """

    num_computed_tokens: int
    num_query_tokens: int

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
    float rounding. All of a layer's keys and values are written before any query reads: sequences of one step may share
    blocks that this step fills.

    Args:
        cache: where keys and values live.
        tables_RB: int64 block tables; only what a slice needs of its row is read.
        rows_T, positions_T: int64; the table row and the position of each token.
        decode_lens: lengths after the step of the sequences with one query token, whose tokens come first.
        prefills: the other sequences, in the order of their tokens.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        tables_RB: torch.Tensor,
        rows_T: torch.Tensor,
        positions_T: torch.Tensor,
        decode_lens: Sequence[int],
        prefills: Sequence[SequenceSlice],
    ) -> None:
        self._cache, self._tables_RB = cache, tables_RB
        self._rows_T, self._positions_T = rows_T, positions_T
        self._decode_lens, self._slices = decode_lens, prefills
        self._num_decodes = len(decode_lens)
        self._prepared = False

    def _prepare(self) -> None:
        """Finds the slots that all layers read and write: work of the first layer, so that no layers cost none."""
        self._prepared = True
        tables_RB, rows_T, positions_T, decode_lens = (
            self._tables_RB,
            self._rows_T,
            self._positions_T,
            self._decode_lens,
        )
        device, size = tables_RB.device, self._cache.block_size
        blocks_T = tables_RB[rows_T, positions_T // size]
        self._new_slots_T = blocks_T * size + positions_T % size
        if self._num_decodes:
            decodes, longest = slice(0, self._num_decodes), max(decode_lens)
            slots_SL = self._slots(rows_T[decodes], longest)
            mask_SL = torch.arange(longest, device=device) <= positions_T[decodes, None]
            # A masked key still multiplies its value by 0, and 0 · inf is nan: pad with the sequence's own first slot,
            # never with one that somebody else may have filled.
            self._decode_slots_SL = torch.where(mask_SL, slots_SL, slots_SL[:, :1])
            self._decode_mask_S11L = None if min(decode_lens) == longest else mask_SL[:, None, None]
        self._prefills: list[_Prefill] = []
        start = self._num_decodes
        for s in self._slices:
            rows = slice(start, start + s.num_query_tokens)
            slots_L = self._slots(rows_T[start : start + 1], s.seq_len)[0]
            mask_QL = None
            if s.num_computed_tokens:
                mask_QL = torch.arange(s.seq_len, device=device) <= positions_T[rows, None]
            self._prefills.append(_Prefill(rows, slots_L, mask_QL))
            start += s.num_query_tokens

    def _slots(self, rows_S: torch.Tensor, length: int) -> torch.Tensor:
        """The slots of the first `length` positions of some rows, int64 [S, length]."""
        size = self._cache.block_size
        blocks_SB = self._tables_RB[rows_S, : -(-length // size)]
        offsets = torch.arange(size, device=blocks_SB.device)
        return (blocks_SB[:, :, None] * size + offsets).flatten(1)[:, :length]

    def __call__(self, layer: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor) -> torch.Tensor:
        """Writes the step's keys and values, then attends; [T, H, E] in and out."""
        if not self._prepared:
            self._prepare()
        k_cache, v_cache = self._cache.k[layer], self._cache.v[layer]
        k_cache[self._new_slots_T] = k_TKE.to(k_cache.dtype)  # which may be float8
        v_cache[self._new_slots_T] = v_TKE.to(v_cache.dtype)
        out_THE = torch.empty_like(q_THE)
        if self._num_decodes:
            rows = slice(0, self._num_decodes)
            out_THE[rows] = self._decode(q_THE[rows], k_cache, v_cache)
        for prefill in self._prefills:
            out_THE[prefill.rows] = _attend_one(q_THE[prefill.rows], k_cache, v_cache, prefill)
        return out_THE

    def _decode(self, q_SHE: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        k_SKLE = k_cache[self._decode_slots_SL].to(q_SHE.dtype).transpose(1, 2)
        v_SKLE = v_cache[self._decode_slots_SL].to(q_SHE.dtype).transpose(1, 2)
        # The G query heads of a key/value head see the same keys: they can stand where queries of a sequence would.
        q_SKGE = q_SHE.view(q_SHE.shape[0], k_SKLE.shape[1], -1, q_SHE.shape[-1])
        out_SKGE = F.scaled_dot_product_attention(q_SKGE, k_SKLE, v_SKLE, attn_mask=self._decode_mask_S11L)
        return out_SKGE.flatten(1, 2)


def _attend_one(q_QHE: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, p: _Prefill) -> torch.Tensor:
    q_HQE = q_QHE.transpose(0, 1)[None]
    k_KLE, v_KLE = (cache[p.slots_L].to(q_QHE.dtype).transpose(0, 1)[None] for cache in (k_cache, v_cache))
    out = F.scaled_dot_product_attention(
        q_HQE, k_KLE, v_KLE, attn_mask=p.mask_QL, is_causal=p.mask_QL is None, enable_gqa=True
    )
    return out[0].transpose(0, 1)

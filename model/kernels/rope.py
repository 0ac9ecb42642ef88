"""Rotation and cache write behind a QKV product of many rows; with few, `linear.py` does both in the product.

Shape suffixes: T tokens, H query and K key/value heads of this rank, E head width, N = (H + 2K) · E, P parts of a
norm's sum.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpserve.model.kernels.norm import Normed, inverse_rms, load_sums


@triton.jit
def as_kept(y, DTYPE: tl.constexpr):
    """Keys or values in the cache's type; float8_e4m3fn has no infinity, and nothing beyond 448."""
    if tl.float8e4nv == DTYPE:
        y = tl.minimum(tl.maximum(y.to(tl.float32), -448.0), 448.0)
    return y.to(DTYPE)


# Whether the host's pointers are aligned depends on a step's size: they must not make another variant.
@triton.jit(do_not_specialize=["positions_ptr", "slots_ptr"])
def _rope_and_write_kernel(
    y_ptr, sums_ptr, q_ptr, k_ptr, v_ptr, rope_ptr, positions_ptr, slots_ptr,
    D: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, P: tl.constexpr,
    EPS: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    position, slot = tl.load(positions_ptr + t), tl.load(slots_ptr + t)
    head, e = tl.arange(0, HEADS)[:, None], tl.arange(0, EP)
    there = (head >= 0) & (e[None, :] < E)
    y = tl.load(y_ptr + (t * (H + 2 * KV) + first + head) * E + e[None, :], mask=there, other=0.0)
    if P > 0:
        y = y.to(tl.float32) * tl.sum(inverse_rms(load_sums(sums_ptr + t * P, P, 1), D, EPS), 0)
    if first >= H + KV:
        at = (slot * KV + first - H - KV + head) * E + e[None, :]
        tl.store(v_ptr + at, as_kept(y, v_ptr.dtype.element_ty), mask=there & (slot >= 0))
        return
    even, odd = tl.split(tl.reshape(y.to(tl.float32), [HEADS, EP // 2, 2]))
    angle = tl.load(rope_ptr + position * E + e, mask=(e < E) & (position >= 0), other=0.0)
    cos, sin = tl.split(tl.reshape(angle, [EP // 2, 2]))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    turned = tl.reshape(turned, [HEADS, EP]).to(q_ptr.dtype.element_ty)
    if first < H:
        tl.store(q_ptr + (t * H + first + head) * E + e[None, :], turned, mask=there)
    else:
        where = k_ptr + (slot * KV + first - H + head) * E + e[None, :]
        tl.store(where, as_kept(turned, k_ptr.dtype.element_ty), mask=there & (slot >= 0))


def rope_and_write(
    y_TN: torch.Tensor,
    q_THE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rope_PC2: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    normed: Normed | None = None,
    parts: int = 0,
    *,
    pdl: bool = False,
) -> None:
    """Queries, rotated, to `q_THE`; keys, rotated, and values to the cache.

    Args:
        y_TN: heads of queries, keys and values side by side, contiguous.
        k_cache, v_cache: [slots, K, E].
        rope_PC2: `tpserve.model.rope.rope_table`, float32 [positions, E / 2, 2].
        positions_T: int64; a negative position is padding: its queries become 0.
        slots_T: int64, of the keys and values; -1: nowhere.
        normed, parts: of the norm that the product's input still lacks, and how many parts its sums have; None: none.
        pdl: programmatic dependent launch.
    """
    t, h, e = q_THE.shape
    kv = k_cache.shape[1]
    both = math.gcd(h, kv)
    heads = min(both & -both, 16)  # a program's heads are all queries, all keys or all values
    _rope_and_write_kernel[(t, (h + 2 * kv) // heads)](
        y_TN, y_TN if normed is None else normed.sums, q_THE, k_cache, v_cache, rope_PC2, positions_T, slots_T,
        D=1 if normed is None else normed.x_SD.shape[1], H=h, KV=kv, E=e, EP=triton.next_power_of_2(e), P=parts,
        EPS=0.0 if normed is None else normed.eps, HEADS=heads, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip

"""What surrounds cuBLAS's products when a step has many rows; with few, `linear.py` does it in the products themselves.

Shape suffixes: S rows of the step, D residual width, H query and K key/value heads of this rank, E head width, F
feed-forward width, N columns, P parts of a norm's sum.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpserve.model.kernels.norm import Normed, inverse_rms, load_sums


@triton.jit
def _rope_and_write_kernel(
    y_ptr, sums_ptr, q_ptr, k_ptr, v_ptr, rope_ptr, positions_ptr, slots_ptr,
    D: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, P: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    head, s = tl.program_id(0), tl.program_id(1)
    scale = tl.sum(inverse_rms(load_sums(sums_ptr + s * P, P, 1), D, EPS), 0)
    position, slot = tl.load(positions_ptr + s), tl.load(slots_ptr + s)
    pair = tl.arange(0, EP // 2)
    y = y_ptr + (s * (H + 2 * KV) + head).to(tl.int64) * E + 2 * pair
    even = tl.load(y, mask=2 * pair < E, other=0.0).to(tl.float32) * scale
    odd = tl.load(y + 1, mask=2 * pair < E, other=0.0).to(tl.float32) * scale
    rotates = (2 * pair < E) & (position >= 0) & (head < H + KV)  # values are not rotated
    cos = tl.load(rope_ptr + position * E + 2 * pair, mask=rotates, other=1.0)
    sin = tl.load(rope_ptr + position * E + 2 * pair + 1, mask=rotates, other=0.0)
    rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos).to(q_ptr.dtype.element_ty)
    e = 2 * pair[:, None] + tl.arange(0, 2)[None, :]
    if head < H:
        tl.store(q_ptr + (s * H + head) * E + e, rotated, mask=e < E)
    elif head < H + KV:
        tl.store(k_ptr + (slot * KV + head - H) * E + e, rotated, mask=(e < E) & (slot >= 0))
    else:
        tl.store(v_ptr + (slot * KV + head - H - KV) * E + e, rotated, mask=(e < E) & (slot >= 0))


@triton.jit
def _silu_kernel(
    y_ptr, sums_ptr, out_ptr, D: tl.constexpr, F: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr, C: tl.constexpr
):
    s = tl.program_id(1)
    scale = tl.sum(inverse_rms(load_sums(sums_ptr + s * P, P, 1), D, EPS), 0)
    cols = tl.program_id(0) * C + tl.arange(0, C)
    y = y_ptr + s.to(tl.int64) * (2 * F) + cols
    gate = tl.load(y, mask=cols < F, other=0.0).to(tl.float32) * scale
    up = tl.load(y + F, mask=cols < F, other=0.0).to(tl.float32) * scale
    act = (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + s.to(tl.int64) * F + cols, act, mask=cols < F)


@triton.jit
def _scale_kernel(
    y_ptr, sums_ptr, out_ptr, D: tl.constexpr, N: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr, C: tl.constexpr
):
    s = tl.program_id(1)
    scale = tl.sum(inverse_rms(load_sums(sums_ptr + s * P, P, 1), D, EPS), 0)
    cols = tl.program_id(0) * C + tl.arange(0, C)
    where = s.to(tl.int64) * N + cols
    y = tl.load(y_ptr + where, mask=cols < N, other=0.0).to(tl.float32) * scale
    tl.store(out_ptr + where, y, mask=cols < N)


def rope_and_write(
    y_SN: torch.Tensor,
    normed: Normed,
    parts: int,
    q_SHE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rope_PC2: torch.Tensor,
    positions_S: torch.Tensor,
    slots_S: torch.Tensor,
) -> None:
    """Ends the norm of a QKV product [S, (H + 2K) · E], rotates, and writes as `linear.qkv` does."""
    h, e = q_SHE.shape[1:]
    kv = k_cache.shape[1]
    _rope_and_write_kernel[(h + 2 * kv, y_SN.shape[0])](
        y_SN, normed.sums, q_SHE, k_cache, v_cache, rope_PC2, positions_S, slots_S,
        D=normed.x_SD.shape[1], H=h, KV=kv, E=e, EP=triton.next_power_of_2(e), P=parts, EPS=normed.eps, num_warps=1,
    )  # fmt: skip


def silu_mul(y_SN: torch.Tensor, normed: Normed, parts: int, out_SF: torch.Tensor) -> None:
    """Ends the norm of a gate-and-up product [S, 2F], then SiLU(gate) · up."""
    s, f = out_SF.shape
    _silu_kernel[(triton.cdiv(f, 1024), s)](
        y_SN, normed.sums, out_SF, D=normed.x_SD.shape[1], F=f, P=parts, EPS=normed.eps, C=1024
    )


def scale(y_SN: torch.Tensor, normed: Normed, parts: int, out_SN: torch.Tensor) -> None:
    """Ends the norm of a product, in float32."""
    s, n = out_SN.shape
    _scale_kernel[(triton.cdiv(n, 1024), s)](
        y_SN, normed.sums, out_SN, D=normed.x_SD.shape[1], N=n, P=parts, EPS=normed.eps, C=1024
    )

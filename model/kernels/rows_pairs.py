"""Products of some tens of rows on Hopper whose outputs are made of two of the sums, and end with that: rotary
embedding and the write into the cache behind QKV, SiLU · up behind gate and up.

A tile has as many rows of one kind as of the other (even and odd features, gate and up), which come by copies of their
own; the rest is `rows_product.py`.

Shape suffixes: S rows of the step, H query and K key/value heads, E head width, D residual width, N rows of a joined
matrix, F feed-forward width, P parts of a norm's sum.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpserve.model.kernels.norm import Normed
from tpserve.model.kernels.rows_product import (
    ask_for_rows,
    ask_for_weights,
    rows_descriptor,
    steps_of,
    sum_up,
    weight_descriptor,
)
from tpserve.model.kernels.rows_tile import RowsTile, padded, warps
from tpserve.model.kernels.rows_widened import group_scales, scaled
from tpserve.model.matrix import Matrix


@gluon.constexpr_function
def _ends_layout(num_warps):
    """Of [BN / 2, M, 2]: a lane has both sums, its neighbour those of the next output."""
    return gl.BlockedLayout([1, 1, 2], [32, 1, 1], [1, num_warps, 1], [2, 0, 1])


@gluon.jit
def _load_squares(sums_ptr, P: gl.constexpr, M: gl.constexpr):
    """The parts of M rows' sums of squares; without any, nothing that is used."""
    PARTS: gl.constexpr = triton.next_power_of_2(max(P, 1))
    LANES: gl.constexpr = min(PARTS, 32)
    BOTH: gl.constexpr = gl.BlockedLayout([1, 1], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    m, part = gl.arange(0, M, gl.SliceLayout(1, BOTH)), gl.arange(0, PARTS, gl.SliceLayout(0, BOTH))
    if P > 0:
        mask = (part < P)[None, :] & (m >= 0)[:, None]
        squares = gl.load(sums_ptr + m[:, None] * P + part[None, :], mask=mask, other=0.0)
    else:
        squares = gl.zeros([M, PARTS], gl.float32, BOTH)
    return squares


@gluon.jit
def _halves(acc, squares, D: gl.constexpr, P: gl.constexpr, EPS: gl.constexpr, BN: gl.constexpr, M: gl.constexpr):
    """float32 [BN / 2, M] of one kind and the other, over their rows' norm if there is one."""
    ENDS: gl.constexpr = _ends_layout(gl.num_warps())
    both = gl.convert_layout(acc.reshape([2, BN // 2, M]).permute((1, 2, 0)), ENDS)
    a, b = gl.split(both)
    if P > 0:
        scale = gl.rsqrt(gl.sum(squares, 1) / D + EPS)
        scale = gl.convert_layout(scale, gl.SliceLayout(0, gl.SliceLayout(2, ENDS)))[None, :]
        a, b = a * scale, b * scale
    return a, b


@gluon.jit(do_not_specialize=["num_rows"])
def _gate_up_kernel(
    gate_desc, up_desc, scale_ptr, x_desc, sums_ptr, out_ptr, num_rows,
    K: gl.constexpr, F: gl.constexpr, P: gl.constexpr, EPS: gl.constexpr, M: gl.constexpr, BN: gl.constexpr,
    ENTRIES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    ENDS: gl.constexpr = gl.SliceLayout(2, _ends_layout(gl.num_warps()))
    STEPS: gl.constexpr = steps_of(gate_desc, K)
    row = gl.program_id(0) * (BN // 2)
    ws, xs, full = ask_for_weights(gate_desc, up_desc, x_desc, row, 0, M, BN, ENTRIES, 2)
    if PDL:
        gdc_launch_dependents()
    scales = full
    if gate_desc.dtype == gl.uint8:
        scales = group_scales(scale_ptr, row, F + row, 0, K, 2 * F, 1, BN, STEPS)
    if PDL:
        gdc_wait()
    ask_for_rows(x_desc, xs, full, 0, ENTRIES)
    squares = _load_squares(sums_ptr, P, M)
    acc = sum_up(gate_desc, up_desc, x_desc, ws, xs, full, scales, row, 0, STEPS, M, BN, ENTRIES, 2)
    if gate_desc.dtype != x_desc.dtype and gate_desc.dtype != gl.uint8:
        acc = scaled(acc, scale_ptr, row, F + row, 2 * F, 1, BN)
    gate, up = _halves(acc, squares, K, P, EPS, BN, M)
    act = gate / (1.0 + gl.exp(-gate)) * up
    n, m = gl.arange(0, BN // 2, gl.SliceLayout(1, ENDS)) + row, gl.arange(0, M, gl.SliceLayout(0, ENDS))
    there = (m < num_rows)[None, :] & (n < F)[:, None]
    gl.store(out_ptr + m[None, :] * F + n[:, None], act.to(out_ptr.dtype.element_ty), mask=there)


@gluon.jit
def _store_pairs(ptr, row, WIDTH: gl.constexpr, n, even, odd):
    """In row `row` (-1: nowhere) of WIDTH pairs, those of number `n`: two 16-bit numbers in one word."""
    DTYPE: gl.constexpr = ptr.dtype.element_ty
    low, high = even.to(DTYPE).to(gl.uint16, bitcast=True), odd.to(DTYPE).to(gl.uint16, bitcast=True)
    words = low.to(gl.uint32) | (high.to(gl.uint32) << 16)
    where = ptr.to(gl.pointer_type(gl.uint32), bitcast=True) + row.to(gl.int64)[None, :] * WIDTH + n[:, None]
    gl.store(where, words, mask=(row >= 0)[None, :] & (n >= 0)[:, None])


@gluon.jit
def _angles(rope_ptr, positions_ptr, first, there, rotates, E: gl.constexpr, BN: gl.constexpr, M: gl.constexpr):
    """Cosines and sines of a tile's pairs, from number `first` on, at their rows' positions; of an angle of 0 where
    nothing rotates. Positions are the step's input: there before it began."""
    ENDS: gl.constexpr = gl.SliceLayout(2, _ends_layout(gl.num_warps()))
    n, m = gl.arange(0, BN // 2, gl.SliceLayout(1, ENDS)) + first, gl.arange(0, M, gl.SliceLayout(0, ENDS))
    position = gl.load(positions_ptr + m, mask=there, other=-1)
    angle = rope_ptr + position[None, :] * E + (2 * (n % (E // 2)))[:, None]
    mask = ((position >= 0) & rotates)[None, :] & (n >= 0)[:, None]
    return gl.load(angle, mask=mask, other=1.0), gl.load(angle + 1, mask=mask, other=0.0)


# Positions may be a slice of what came from the host, of any alignment.
@gluon.jit(do_not_specialize=["positions_ptr", "slots_ptr", "num_rows"])
def _qkv_kernel(
    even_desc, odd_desc, scale_ptr, x_desc, sums_ptr, q_ptr, k_ptr, v_ptr, rope_ptr, positions_ptr, slots_ptr,
    num_rows,
    D: gl.constexpr, H: gl.constexpr, KV: gl.constexpr, E: gl.constexpr, P: gl.constexpr, EPS: gl.constexpr,
    M: gl.constexpr, BN: gl.constexpr, ENTRIES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    ENDS: gl.constexpr = gl.SliceLayout(2, _ends_layout(gl.num_warps()))
    row = gl.program_id(0) * (BN // 2)  # of pairs of features, of which a head has E / 2
    QUERIES: gl.constexpr = H * E // 2
    KEYS: gl.constexpr = KV * E // 2
    STEPS: gl.constexpr = steps_of(even_desc, D)
    N: gl.constexpr = (H + 2 * KV) * E
    ws, xs, full = ask_for_weights(even_desc, odd_desc, x_desc, row, 0, M, BN, ENTRIES, 2)
    m = gl.arange(0, M, gl.SliceLayout(0, ENDS))
    there = m < num_rows
    cos, sin = _angles(rope_ptr, positions_ptr, row, there, row < QUERIES + KEYS, E, BN, M)
    if PDL:
        gdc_launch_dependents()
    scales = full
    if even_desc.dtype == gl.uint8:
        scales = group_scales(scale_ptr, 2 * row, 2 * row + 1, 0, D, N, 2, BN, STEPS)
    if PDL:
        gdc_wait()
    ask_for_rows(x_desc, xs, full, 0, ENTRIES)
    squares = _load_squares(sums_ptr, P, M)
    slot = gl.load(slots_ptr + m, mask=there, other=-1)
    acc = sum_up(even_desc, odd_desc, x_desc, ws, xs, full, scales, row, 0, STEPS, M, BN, ENTRIES, 2)
    if even_desc.dtype != x_desc.dtype and even_desc.dtype != gl.uint8:
        acc = scaled(acc, scale_ptr, 2 * row, 2 * row + 1, N, 2, BN)
    even, odd = _halves(acc, squares, D, P, EPS, BN, M)
    n = gl.arange(0, BN // 2, gl.SliceLayout(1, ENDS)) + row
    even, odd = even * cos - odd * sin, even * sin + odd * cos
    if row < QUERIES:
        _store_pairs(q_ptr, gl.where(there, m, -1), QUERIES, n, even, odd)
    elif row < QUERIES + KEYS:
        _store_pairs(k_ptr, slot, KEYS, n - QUERIES, even, odd)
    else:
        _store_pairs(v_ptr, slot, KEYS, n - QUERIES - KEYS, even, odd)


def qkv(
    x_SD: torch.Tensor,
    w_ND: Matrix,
    q_SHE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rope_PC2: torch.Tensor,
    positions_S: torch.Tensor,
    slots_S: torch.Tensor,
    normed: Normed | None,
    parts: int,
    tile: RowsTile,
    *,
    pdl: bool = False,
) -> None:
    """Rotated queries to `q_SHE`, rotated keys and values to the cache slots `slots_S` (-1: nowhere).

    Args:
        x_SD: contiguous.
        w_ND: the rows of wq, wk and wv, one below the other, contiguous.
        q_SHE: contiguous.
        k_cache, v_cache: of the weight's type.
        rope_PC2: `tpserve.model.rope.rope_table`, float32 [positions, E / 2, 2].
        positions_S: int64; -1: padding. No kernel since the last one that was launched normally may have written them.
        slots_S: int64.
        normed, parts: of the norm that x still lacks, and how many parts its sums have; None: none.
        tile: not in parts; see `fits_qkv`.
        pdl: programmatic dependent launch.
    """
    (n, d), (s, h, e), M, half = w_ND.shape, q_SHE.shape, padded(len(x_SD)), tile.rows // 2
    _qkv_kernel[(n // tile.rows,)](
        weight_descriptor(w_ND.q[::2], half), weight_descriptor(w_ND.q[1::2], half),
        w_ND.q if w_ND.scale is None else w_ND.scale, rows_descriptor(x_SD, M, w_ND.q),
        x_SD if normed is None else normed.sums, q_SHE, k_cache, v_cache, rope_PC2, positions_S, slots_S, s,
        D=d, H=h, KV=k_cache.shape[1], E=e, P=parts, EPS=0.0 if normed is None else normed.eps, M=M, BN=tile.rows,
        ENTRIES=tile.entries, PDL=pdl, num_warps=warps(tile), launch_pdl=pdl,
    )  # fmt: skip


def fits_qkv(tile: RowsTile, q_SHE: torch.Tensor, k_cache: torch.Tensor) -> bool:
    """Whether a tile has queries, keys or values only, and they go to memory as they are."""
    (_, h, e), kv = q_SHE.shape, k_cache.shape[1]
    return h * e % tile.rows == 0 and kv * e % tile.rows == 0 and k_cache.dtype == q_SHE.dtype


def gate_up(
    x_SD: torch.Tensor,
    w_ND: Matrix,
    out_SF: torch.Tensor,
    normed: Normed | None,
    parts: int,
    tile: RowsTile,
    *,
    pdl: bool = False,
) -> None:
    """SiLU(x @ w1ᵀ) · (x @ w3ᵀ).

    Args:
        x_SD: contiguous.
        w_ND: w1 above w3, contiguous.
        out_SF: contiguous.
        normed, parts: of the norm that x still lacks, and how many parts its sums have; None: none.
        tile: not in parts.
        pdl: programmatic dependent launch.
    """
    d, (s, f), M, half = w_ND.shape[1], out_SF.shape, padded(len(x_SD)), tile.rows // 2
    _gate_up_kernel[(triton.cdiv(f, half),)](
        weight_descriptor(w_ND.q[:f], half), weight_descriptor(w_ND.q[f:], half),
        w_ND.q if w_ND.scale is None else w_ND.scale, rows_descriptor(x_SD, M, w_ND.q),
        x_SD if normed is None else normed.sums, out_SF, s, K=d, F=f, P=parts,
        EPS=0.0 if normed is None else normed.eps, M=M, BN=tile.rows, ENTRIES=tile.entries, PDL=pdl,
        num_warps=warps(tile), launch_pdl=pdl,
    )  # fmt: skip

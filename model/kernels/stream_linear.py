"""The products of a decode step of one sequence with int4 weights: `stream.py`, with what `linear.py` does at the end.

Shape suffixes are those of `linear.py`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tpserve.model.kernels.all_reduce import WordExchange
from tpserve.model.kernels.norm import Normed
from tpserve.model.kernels.stream import begin, pairs, stream, whole
from tpserve.model.kernels.tiles import Stream
from tpserve.model.matrix import Matrix


@gluon.jit
def _my_tiles(TILES: gl.constexpr, PROGRAMS: gl.constexpr):
    """The first of this program's tiles, and how many it has."""
    first = gl.program_id(0) * TILES // PROGRAMS
    return first, (gl.program_id(0) + 1) * TILES // PROGRAMS - first


@gluon.jit
def _load_sums(sums_ptr, P: gl.constexpr, WARPS: gl.constexpr):
    L: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    part = gl.arange(0, triton.next_power_of_2(P), L)
    return gl.load(sums_ptr + part, mask=part < P, other=0.0)


@gluon.jit
def _inverse_rms(sums, D: gl.constexpr, EPS: gl.constexpr):
    return gl.rsqrt(gl.sum(sums, 0) / D + EPS)


@gluon.jit
def _qkv_kernel(
    x_ptr, sums_ptr, w_ptr, scale_ptr, q_ptr, k_ptr, v_ptr, rope_ptr, positions_ptr, slots_ptr,
    K: gl.constexpr, H: gl.constexpr, KV: gl.constexpr, E: gl.constexpr, P: gl.constexpr, EPS: gl.constexpr,
    ROWS: gl.constexpr, MOST: gl.constexpr, EACH: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    first, tiles = _my_tiles(ROWS // 16, PROGRAMS)
    position = gl.load(positions_ptr)  # of the step's input: there before it began
    t, pair = gl.arange(0, MOST, gl.SliceLayout(1, pairs(WARPS))), gl.arange(0, 8, gl.SliceLayout(0, pairs(WARPS)))
    row = (first + t[:, None]) * 16 + 2 * pair[None, :]
    head, e = row // E, row % E
    mine = (t < tiles)[:, None]
    rotates = mine & (head < H + KV) & (position >= 0)
    cos = gl.load(rope_ptr + position * E + e, mask=rotates, other=1.0)
    sin = gl.load(rope_ptr + position * E + e + 1, mask=rotates, other=0.0)
    ring, scales, addresses = begin(w_ptr, scale_ptr, first, tiles, K, 0, ROWS, EACH, WARPS, STAGES, PDL)
    slot, sums = gl.load(slots_ptr), _load_sums(sums_ptr, P, WARPS)
    y = stream(ring, scales, addresses, x_ptr, tiles, K, 0, ROWS, MOST, EACH, WARPS, STAGES)
    even, odd = gl.split(gl.reshape(y * _inverse_rms(sums, K, EPS), [MOST, 8, 2]))
    even, odd = gl.convert_layout(even, pairs(WARPS)), gl.convert_layout(odd, pairs(WARPS))
    even, odd = even * cos - odd * sin, even * sin + odd * cos
    queries, keys = mine & (head < H), mine & (head >= H) & (head < H + KV) & (slot >= 0)
    values = mine & (head >= H + KV) & (slot >= 0)
    k_at = k_ptr + slot * (KV * E) + (row - H * E)
    v_at = v_ptr + slot * (KV * E) + (row - (H + KV) * E)
    for odd_one in gl.static_range(2):
        y = (odd if odd_one else even).to(q_ptr.dtype.element_ty)
        gl.store(q_ptr + row + odd_one, y, mask=queries)
        kept = _as_kept(y, k_ptr.dtype.element_ty)
        gl.store(k_at + odd_one, kept, mask=keys)
        gl.store(v_at + odd_one, kept, mask=values)


@gluon.jit
def _as_kept(y, DTYPE: gl.constexpr):
    """See `rope.as_kept`."""
    if gl.float8e4nv == DTYPE:
        y = gl.minimum(gl.maximum(y.to(gl.float32), -448.0), 448.0)
    return y.to(DTYPE)


@gluon.jit
def _gate_up_kernel(
    x_ptr, sums_ptr, w_ptr, scale_ptr, y_ptr,
    K: gl.constexpr, F: gl.constexpr, P: gl.constexpr, EPS: gl.constexpr,
    ROWS: gl.constexpr, MOST: gl.constexpr, EACH: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    first, tiles = _my_tiles(ROWS // 16, PROGRAMS)
    ring, scales, addresses = begin(w_ptr, scale_ptr, first, tiles, K, F, ROWS, EACH, WARPS, STAGES, PDL)
    sums = _load_sums(sums_ptr, P, WARPS)
    y = stream(ring, scales, addresses, x_ptr, tiles, K, F, ROWS, MOST, EACH, WARPS, STAGES)
    gate, up = gl.split(gl.reshape(y * _inverse_rms(sums, K, EPS), [MOST, 8, 2]))
    y = gl.convert_layout(gate / (1.0 + gl.exp(-gate)) * up, pairs(WARPS))
    t, pair = gl.arange(0, MOST, gl.SliceLayout(1, pairs(WARPS))), gl.arange(0, 8, gl.SliceLayout(0, pairs(WARPS)))
    at = y_ptr + (first + t[:, None]) * 8 + pair[None, :]
    gl.store(at, y.to(y_ptr.dtype.element_ty), mask=(t < tiles)[:, None])


@gluon.jit
def _residual_kernel(
    x_ptr, w_ptr, scale_ptr, residual_ptr, gain_ptr, y_ptr, sums_ptr,
    K: gl.constexpr, ROWS: gl.constexpr, MOST: gl.constexpr, EACH: gl.constexpr, WARPS: gl.constexpr,
    STAGES: gl.constexpr, PROGRAMS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    first, tiles = _my_tiles(ROWS // 16, PROGRAMS)
    t, r = gl.arange(0, MOST, gl.SliceLayout(1, whole(WARPS))), gl.arange(0, 16, gl.SliceLayout(0, whole(WARPS)))
    at, mine = (first + t[:, None]) * 16 + r[None, :], (t < tiles)[:, None]
    gain = gl.load(gain_ptr + at, mask=mine, other=0.0).to(gl.float32)
    ring, scales, addresses = begin(w_ptr, scale_ptr, first, tiles, K, 0, ROWS, EACH, WARPS, STAGES, PDL)
    residual = gl.load(residual_ptr + at, mask=mine, other=0.0)
    y = stream(ring, scales, addresses, x_ptr, tiles, K, 0, ROWS, MOST, EACH, WARPS, STAGES)
    residual = gl.where(mine, residual + y, 0.0)
    gl.store(residual_ptr + at, residual, mask=mine)
    gl.store(y_ptr + at, (residual * gain).to(y_ptr.dtype.element_ty), mask=mine)
    gl.store(sums_ptr + gl.program_id(0), gl.sum(gl.sum(residual * residual, 1), 0))


@gluon.jit(do_not_specialize=["offset", "index", "per_step"])
def _push_kernel(
    x_ptr, w_ptr, scale_ptr, peers_ptr, step_ptr, offset, index, per_step, RANK: gl.constexpr, RANKS: gl.constexpr,
    K: gl.constexpr, ROWS: gl.constexpr, MOST: gl.constexpr, EACH: gl.constexpr, WARPS: gl.constexpr,
    STAGES: gl.constexpr, PROGRAMS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    first, tiles = _my_tiles(ROWS // 16, PROGRAMS)
    ring, scales, addresses = begin(w_ptr, scale_ptr, first, tiles, K, 0, ROWS, EACH, WARPS, STAGES, PDL)
    epoch = gl.load(step_ptr) * per_step + index
    y = stream(ring, scales, addresses, x_ptr, tiles, K, 0, ROWS, MOST, EACH, WARPS, STAGES)
    t, r = gl.arange(0, MOST, gl.SliceLayout(1, whole(WARPS))), gl.arange(0, 16, gl.SliceLayout(0, whole(WARPS)))
    at, mine = offset + RANK * ROWS + (first + t[:, None]) * 16 + r[None, :], (t < tiles)[:, None]
    word = (epoch.to(gl.int64) << 32) | (y.to(gl.int32, bitcast=True).to(gl.int64) & 0xFFFFFFFF)  # `all_reduce.push`
    for i in gl.static_range(RANKS):
        buffer = gl.load(peers_ptr + (RANK + 1 + i) % RANKS).to(gl.pointer_type(gl.int64))
        gl.store(buffer + at, word, mask=mine)


def _launch(
    kernel: Any, tile: Stream, pdl: bool, x: torch.Tensor | Normed, w: Matrix, *args: Any, **constants: Any
) -> int:
    """Returns the number of programs."""
    rows, depth = w.shape
    inputs = (x.x_SD, x.sums) if isinstance(x, Normed) else (x,)
    kernel[(tile.programs,)](
        *inputs, w.q, w.scale, *args, **constants, K=depth, ROWS=rows,
        MOST=triton.next_power_of_2(triton.cdiv(rows // 16, tile.programs)), EACH=tile.each, WARPS=tile.warps,
        STAGES=tile.stages, PROGRAMS=tile.programs, PDL=pdl, num_warps=tile.warps, maxnreg=tile.registers,
        launch_pdl=pdl,
    )  # fmt: skip
    return tile.programs


def qkv(
    normed: Normed, parts: int, w_ND: Matrix, q_SHE: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    rope_PC2: torch.Tensor, positions_S: torch.Tensor, slots_S: torch.Tensor, tile: Stream, *, pdl: bool,
) -> None:  # fmt: skip
    """See `linear.qkv`; one row."""
    _, h, e = q_SHE.shape
    _launch(
        _qkv_kernel, tile, pdl, normed, w_ND, q_SHE, k_cache, v_cache, rope_PC2, positions_S, slots_S,
        H=h, KV=k_cache.shape[1], E=e, P=parts, EPS=normed.eps,
    )  # fmt: skip


def gate_up(normed: Normed, parts: int, w_ND: Matrix, y_SF: torch.Tensor, tile: Stream, *, pdl: bool) -> None:
    """See `linear.gate_up`; one row."""
    _launch(_gate_up_kernel, tile, pdl, normed, w_ND, y_SF, F=w_ND.shape[0] // 2, P=parts, EPS=normed.eps)


def add_product(
    x_SK: torch.Tensor, w_DK: Matrix, into: Normed, gain_D: torch.Tensor, tile: Stream, *, pdl: bool
) -> int:
    """See `linear.add_product`; one row."""
    return _launch(_residual_kernel, tile, pdl, x_SK, w_DK, into.residual_SD, gain_D, into.x_SD, into.sums)


def push_product(
    x_SK: torch.Tensor, w_DK: Matrix, exchange: WordExchange, index: int, tile: Stream, *, pdl: bool
) -> None:
    """See `linear.push_product`; one row, one term a rank."""
    _launch(
        _push_kernel, tile, pdl, x_SK, w_DK, exchange.peers, exchange.step, exchange.slot(index), index,
        exchange.per_step, RANK=exchange.tp.rank, RANKS=exchange.tp.size,
    )  # fmt: skip

"""RMSNorm that costs no pass of its own.

rms(h) is one factor a sequence, so it may be divided out after the next product: y = (h·g) @ wᵀ / rms(h). Whoever
writes the residual stream h (float32) also writes x = h·g in the weights' type and, by parts, the sums of squares of h;
the product that reads x ends with `inverse_rms`.

Shape suffixes: S rows, D residual width, P parts of a sum; R, L, B as in `engine/rows.py`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@dataclasses.dataclass(frozen=True, slots=True)
class Normed:
    """A residual stream and what the next product needs of its norm; buffers of at least S rows.

    Attributes:
        residual_SD: float32; behind `RowExchange`, right in this rank's share of the rows only.
        x_SD: residual · gain, in the weights' type; behind `RowExchange`, the norm itself.
        sums: float32; the first S·P hold the parts of the sums of squares, [S, P].
        eps: of the norm.
    """

    residual_SD: torch.Tensor
    x_SD: torch.Tensor
    sums: torch.Tensor
    eps: float


@triton.jit
def load_sums(sums_ptr, P: tl.constexpr, MP: tl.constexpr):
    """float32 [MP, P or more]: the parts of the first MP rows' sums."""
    part = tl.arange(0, triton.next_power_of_2(P))
    row = tl.arange(0, MP)
    return tl.load(sums_ptr + row[:, None] * P + part[None, :], mask=part[None, :] < P, other=0.0)


@triton.jit
def inverse_rms(sums, D: tl.constexpr, EPS: tl.constexpr):
    """float32 [MP]: 1 / rms from `load_sums`; apart from it, so that a product may run while the parts are loaded."""
    return tl.rsqrt(tl.sum(sums, 1) / D + EPS)


@triton.jit
def store_normed(residual, where, gain, residual_ptr, x_ptr, sum_ptr):
    """Writes a piece of one row: the residual, x, and its part of the sum."""
    tl.store(residual_ptr + where, residual)
    tl.store(x_ptr + where, (residual * gain).to(x_ptr.dtype.element_ty))
    tl.store(sum_ptr, tl.sum(residual * residual, 0))


@triton.jit
def _embed_kernel(
    tokens_ptr, tables_ptr, rows_ptr, positions_ptr, embeddings_ptr, gain_ptr,
    residual_ptr, x_ptr, sums_ptr, slots_ptr, step_ptr, tokens_stride, tables_stride,
    D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    part, s = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions_ptr + s)
    row = tl.load(rows_ptr + s)
    known = position >= 0
    token = tl.load(tokens_ptr + row * tokens_stride + position, mask=known, other=0)
    if part == 0:
        block = tl.load(tables_ptr + row * tables_stride + position // BLOCK, mask=known, other=0)
        tl.store(slots_ptr + s, tl.where(known, block * BLOCK + position % BLOCK, -1))
        if s == 0:
            tl.store(step_ptr, tl.load(step_ptr) + 1)
    cols = part * C + tl.arange(0, C)
    residual = tl.load(embeddings_ptr + token * D + cols).to(tl.float32)
    gain = tl.load(gain_ptr + cols).to(tl.float32)
    store_normed(residual, s * D + cols, gain, residual_ptr, x_ptr, sums_ptr + s * (D // C) + part)
    if PDL:
        gdc_wait()  # at the end: nothing here comes from the kernel in front, but what starts after this reads it


@triton.jit
def _add_norm_kernel(
    y_ptr, gain_ptr, residual_ptr, x_ptr, sums_ptr, D: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    part, s = tl.program_id(0), tl.program_id(1)
    cols = part * C + tl.arange(0, C)
    gain = tl.load(gain_ptr + cols).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    where = s * D + cols
    residual = tl.load(residual_ptr + where)
    for i in tl.static_range(PARTS):
        residual += tl.load(y_ptr + i * tl.num_programs(1) * D + where).to(tl.float32)
    store_normed(residual, where, gain, residual_ptr, x_ptr, sums_ptr + s * (D // C) + part)


def _width(dim: int) -> int:
    """Columns a program takes: a power of two that divides `dim`."""
    return min(dim & -dim, 512)


def embed(
    tokens_RL: torch.Tensor,
    tables_RB: torch.Tensor,
    rows_S: torch.Tensor,
    positions_S: torch.Tensor,
    embeddings_VD: torch.Tensor,
    gain_D: torch.Tensor,
    into: Normed,
    slots_S: torch.Tensor,
    step: torch.Tensor,
    block_size: int,
    *,
    pdl: bool = False,
) -> int:
    """Begins a step: counts it, finds each row's cache slot (-1: padding), and embeds its token.

    Args:
        positions_S: of the tokens; -1: padding.
        pdl: programmatic dependent launch: the kernel in front, launched normally, must write nothing that is read
            here, and must not read or write what is written here.

    Returns:
        The parts of the sums of squares.
    """
    dim = embeddings_VD.shape[1]
    width = _width(dim)
    _embed_kernel[(dim // width, len(rows_S))](
        tokens_RL, tables_RB, rows_S, positions_S, embeddings_VD, gain_D,
        into.residual_SD, into.x_SD, into.sums, slots_S, step, tokens_RL.stride(0), tables_RB.stride(0),
        D=dim, C=width, BLOCK=block_size, PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip
    return dim // width


def add(y: torch.Tensor, into: Normed, gain_D: torch.Tensor, *, pdl: bool = False) -> int:
    """residual += y; returns the parts of the new sums of squares.

    Args:
        y: [S, D], or [P, S, D]: P parts of it; contiguous.
    """
    s, dim = y.shape[-2:]
    width = _width(dim)
    _add_norm_kernel[(dim // width, s)](
        y, gain_D, into.residual_SD, into.x_SD, into.sums, D=dim, C=width, PARTS=len(y) if y.ndim == 3 else 1, PDL=pdl,
        launch_pdl=pdl,
    )  # fmt: skip
    return dim // width

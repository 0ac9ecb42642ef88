"""What surrounds products when a step has many rows; with few, `linear.py` does it in the products themselves.

Shape suffixes: S rows of the step, D residual width, F feed-forward width, N columns, P parts of a norm's sum.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpserve.model.kernels.norm import Normed, inverse_rms, load_sums

_MOST_ROWS = 65535  # of a launch: as many as CUDA's grids have places in their second dimension


@triton.jit
def _silu_kernel(
    y_ptr, sums_ptr, out_ptr, D: tl.constexpr, F: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr, C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    s = tl.program_id(1)
    cols = tl.program_id(0) * C + tl.arange(0, C)
    y = y_ptr + s.to(tl.int64) * (2 * F) + cols
    gate = tl.load(y, mask=cols < F, other=0.0).to(tl.float32)
    up = tl.load(y + F, mask=cols < F, other=0.0).to(tl.float32)
    if P > 0:
        scale = tl.sum(inverse_rms(load_sums(sums_ptr + s * P, P, 1), D, EPS), 0)
        gate, up = gate * scale, up * scale
    act = (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + s.to(tl.int64) * F + cols, act, mask=cols < F)


@triton.jit
def _scale_kernel(
    y_ptr, sums_ptr, out_ptr, D: tl.constexpr, N: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr, C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
    s = tl.program_id(1)
    cols = tl.program_id(0) * C + tl.arange(0, C)
    where = s.to(tl.int64) * N + cols
    y = tl.load(y_ptr + where, mask=cols < N, other=0.0).to(tl.float32)
    if P > 0:
        y *= tl.sum(inverse_rms(load_sums(sums_ptr + s * P, P, 1), D, EPS), 0)
    tl.store(out_ptr + where, y, mask=cols < N)


def silu_mul(
    y_SN: torch.Tensor, out_SF: torch.Tensor, normed: Normed | None = None, parts: int = 0, *, pdl: bool = False
) -> None:
    """SiLU(gate) · up of a gate-and-up product [S, 2F].

    Args:
        normed, parts: of the norm that the product's input still lacks, of up to `_MOST_ROWS`, and how many parts its
            sums have; None: none.
        pdl: programmatic dependent launch.
    """
    f = out_SF.shape[1]
    for y, out in zip(y_SN.split(_MOST_ROWS), out_SF.split(_MOST_ROWS), strict=True):
        _silu_kernel[(triton.cdiv(f, 1024), len(out))](
            y, y if normed is None else normed.sums, out, D=1 if normed is None else normed.x_SD.shape[1],
            F=f, P=parts, EPS=0.0 if normed is None else normed.eps, C=1024, PDL=pdl, launch_pdl=pdl,
        )  # fmt: skip


def scale(y_SN: torch.Tensor, normed: Normed, parts: int, out_SN: torch.Tensor, *, pdl: bool = False) -> None:
    """Ends the norm of a product, in float32."""
    s, n = out_SN.shape
    _scale_kernel[(triton.cdiv(n, 1024), s)](
        y_SN, normed.sums, out_SN, D=normed.x_SD.shape[1], N=n, P=parts, EPS=normed.eps, C=1024, PDL=pdl,
        launch_pdl=pdl,
    )  # fmt: skip

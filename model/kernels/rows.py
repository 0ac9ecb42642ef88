"""The residual add and the norm of steps of many tokens: a row of the residual stream a program.

Shape suffixes: T tokens of the step, D residual width.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _add_norm_kernel(
    y_ptr, residual_ptr, gain_ptr, x_ptr, stride,
    D: tl.constexpr, DP: tl.constexpr, EPS: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, DP)
    mask = d < D
    gain = tl.load(gain_ptr + d, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    residual = tl.load(residual_ptr + row * D + d, mask=mask, other=0.0)
    if PARTS > 0:
        for part in tl.static_range(PARTS):
            residual += tl.load(y_ptr + part * stride + row * D + d, mask=mask, other=0.0).to(tl.float32)
        tl.store(residual_ptr + row * D + d, residual, mask=mask)
    scale = tl.rsqrt(tl.sum(residual * residual, 0) / D + EPS)
    tl.store(x_ptr + row * D + d, (residual * scale * gain).to(x_ptr.dtype.element_ty), mask=mask)


def add_norm(
    y: torch.Tensor | None,
    residual_TD: torch.Tensor,
    gain_D: torch.Tensor,
    eps: float,
    out_TD: torch.Tensor | None = None,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """residual += y, in place; returns RMSNorm(residual) in the gain's type.

    Args:
        y: [T, D], or [P, T, D]: P parts of it, whose rows are contiguous; None: only the norm.
        residual_TD: float32, contiguous.
        gain_D: of the norm.
        eps: of the norm.
        out_TD: where to, contiguous; None: new memory.
        pdl: programmatic dependent launch.
    """
    t, d = residual_TD.shape
    x_TD = torch.empty(t, d, dtype=gain_D.dtype, device=gain_D.device) if out_TD is None else out_TD
    parts, stride = (0, 0) if y is None else (1, 0) if y.ndim == 2 else (len(y), y.stride(0))
    _add_norm_kernel[(t,)](
        residual_TD if y is None else y, residual_TD, gain_D, x_TD, stride,
        D=d, DP=triton.next_power_of_2(d), EPS=eps, PARTS=parts, PDL=pdl, num_warps=8,
        launch_pdl=pdl,
    )  # fmt: skip
    return x_TD

"""A weight as the fused kernels read it: of 16 or 32 bits, or of fewer, with scales (`quantized_format.py`).

Shape suffixes: N output and K input features, G groups of inputs.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from tpserve.model.quantized import Float8Linear, Int4Linear, Int8Linear

ROW_SCALES = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [N, K], of one linear layer or of several that read the same input, one below the other.

    Attributes:
        q: bfloat16, float16, float32, int8 or float8_e4m3fn [N, K], or uint8 [N, K / 2].
        scale: float32 [N] or [G, N, 2]; None: q is the weight.
        group: 0: no scales; `ROW_SCALES`: one a row; otherwise the inputs that share a scale and a zero.
    """

    q: torch.Tensor
    scale: torch.Tensor | None = None
    group: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        n, k = self.q.shape
        return n, 2 * k if self.group > 0 else k

    @property
    def scheme(self) -> str:
        """One of `SCHEMES`; empty: none."""
        if self.scale is None:
            return ""
        return "int4" if self.group > 0 else "int8" if self.q.dtype == torch.int8 else "fp8"

    @property
    def nbytes(self) -> int:
        """Of numbers and scales."""
        return self.q.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def row_bytes(self) -> int:
        """Of a row's numbers."""
        return self.q.stride(0) * self.q.element_size()


def join(*linears: nn.Module) -> Matrix:
    """The weights of linear layers that read the same input, whose modules are left with views of it.

    Raises:
        ValueError: some have fewer bits than others.
    """
    first = linears[0]
    if len({type(linear) for linear in linears}) > 1:
        raise ValueError("layers that read the same input differ in their number of bits")
    if isinstance(first, nn.Linear):
        return Matrix(_joined("weight", 0, *linears))
    if isinstance(first, Int8Linear | Float8Linear):
        return Matrix(_joined("q_NK", 0, *linears), _joined("scale_N", 0, *linears), ROW_SCALES)
    assert isinstance(first, Int4Linear), first
    assert first.halved, "made on another device"
    return Matrix(_joined("q_NK", 0, *linears), _joined("scale_GN2", 1, *linears), first.group)


def _joined(name: str, dim: int, *linears: nn.Module) -> torch.Tensor:
    pieces: list[torch.Tensor] = [getattr(linear, name).detach() for linear in linears]
    if len(pieces) == 1:
        return pieces[0].contiguous()
    joined = torch.cat(pieces, dim)
    views = torch.split(joined, [piece.shape[dim] for piece in pieces], dim)
    for linear, view in zip(linears, views, strict=True):
        setattr(linear, name, nn.Parameter(view, requires_grad=False) if name == "weight" else view)
    return joined

"""Weights that are written with fewer bits: each matrix of the blocks becomes its quantised parts, slab by slab.

A matrix is read twice, a few rows or columns at a time: for its scales, which are of whole rows (int4: of groups of
inputs), and for the numbers. What a rank makes of the same weights at load is the same, but for `wo` and `w2` at more
than one rank in int8 and fp8: it sees only its part of their rows, and scales by that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from tpserve.convert.errors import ConvertError
from tpserve.convert.weights import Weight, read_slab, row_blocks
from tpserve.model.plan import PART_DIMS
from tpserve.model.quantized_format import Format, format_of


class _Scales:
    """The scales of one matrix at a time: its parts are written one after the other.

    Args:
        dtype: that the weights are rounded to first.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._last: tuple[str, torch.Tensor] | None = None

    def of(self, weight: Weight, form: Format) -> torch.Tensor:
        if self._last is None or self._last[0] != weight.name:
            self._last = None  # before the next is made
            self._last = weight.name, self._compute(weight, form)
        return self._last[1]

    def _compute(self, weight: Weight, form: Format) -> torch.Tensor:
        shape, dtype = form.parts(weight.shape)[form.scale_name]
        scale, row = torch.empty(shape, dtype=dtype), 0
        rows_dim = PART_DIMS[form.scale_name][0]
        for block in row_blocks(weight, self.dtype):
            if not torch.isfinite(block).all():
                raise ConvertError(
                    f"{weight.name} has values that are not finite and cannot be quantised; tpserve verify names them"
                )
            scale.narrow(rows_dim, row, block.shape[0]).copy_(form.scale_of(block))
            row += block.shape[0]
        return scale


@dataclasses.dataclass(frozen=True)
class QuantisedPart:
    """One tensor of those that stand for a quantised matrix.

    Attributes:
        name: `layers.3.attention.wq.q_NK`.
        shape: of the whole part.
        stored_dtype: its type.
        weight: the matrix.
        form: how it is quantised.
    """

    name: str
    shape: tuple[int, ...]
    stored_dtype: torch.dtype
    weight: Weight
    form: Format
    _scales: _Scales

    def read(self, dim: int, lo: int, hi: int, dtype: torch.dtype) -> torch.Tensor:
        """Computes the slab [lo, hi) along `dim`.

        Raises:
            ConvertError: the matrix cannot be read, or holds what cannot be quantised; the message names it.
        """
        assert dtype == self.stored_dtype
        scale = self._scales.of(self.weight, self.form)
        if not self.name.endswith(".q_NK"):
            # Not a view: it would be saved with the rest.
            return scale.narrow(dim, lo, hi - lo).clone(memory_format=torch.contiguous_format)
        if dim == 0:
            rows_dim = PART_DIMS[self.form.scale_name][0]
            weight_NK = read_slab(self.weight, 0, lo, hi, self._scales.dtype)
            return self.form.quantise(weight_NK, scale.narrow(rows_dim, lo, hi - lo))
        if not self.form.group:
            return self.form.quantise(read_slab(self.weight, 1, lo, hi, self._scales.dtype), scale)
        group = self.form.group  # a byte holds two inputs; groups are quantised whole
        first, end = 2 * lo // group, -(-2 * hi // group)
        weight_NK = read_slab(self.weight, 1, first * group, end * group, self._scales.dtype)
        q_NK = self.form.quantise(weight_NK, scale[first:end])
        return q_NK[:, lo - first * group // 2 : hi - first * group // 2].clone(memory_format=torch.contiguous_format)


def quantised(tensors: Iterable[Weight], scheme: str, dtype: torch.dtype) -> list[Weight]:
    """What is written for these parameters, in their order: the parts of those that are quantised, others as they are.

    Args:
        tensors: every parameter.
        scheme: int8, int4 or fp8.
        dtype: of the checkpoint, that the weights are rounded to first.
    """
    scales, written = _Scales(dtype), list[Weight]()
    for tensor in tensors:
        form = format_of(tensor.name, tensor.shape, scheme)
        if form is None:
            written.append(tensor)
            continue
        owner = tensor.name.removesuffix(".weight")
        written += (
            QuantisedPart(f"{owner}.{part}", shape, stored_dtype, tensor, form, scales)
            for part, (shape, stored_dtype) in form.parts(tensor.shape).items()
        )
    return written


def rounded_like(
    block_NK: torch.Tensor, name: str, shape: tuple[int, ...], scheme: str | None, *, older: bool = False
) -> torch.Tensor:  # fmt: skip
    """Whole rows of a weight as they come back from a checkpoint that was quantised so; None: as they are.

    Args:
        block_NK: the rows.
        name, shape: of the whole parameter.
        scheme: of the checkpoint.
        older: see `Format.scale_of`.
    """
    form = None if scheme is None else format_of(name, shape, scheme)
    if form is None:
        return block_NK
    scale = form.scale_of(block_NK, older=older)
    return form.dequantise(form.quantise(block_NK, scale), scale)

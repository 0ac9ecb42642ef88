"""Linear layers with fewer bits: made from a rank's own slices after they are loaded, or read so from a checkpoint.

- `int8`: a scale an output feature; activations as they are (TensorRT-LLM's `--use_weight_only`, FasterTransformer's
  `int8_mode`).
- `int4`: a scale and a zero for every 128 inputs of an output feature, asymmetric; activations as they are.
- `fp8`: float8_e4m3fn with a scale an output feature; in bfloat16 on a GPU activations are float8, too, with a scale
  a token, but not of steps of up to 64 tokens that kernels of ours multiply (`kernels/linear.py`, on Hopper also
  `rows_product.py`).

Products are torch's own where it has fast ones for the device and the type; elsewhere weights are widened for each
product, which saves memory but no time. Embedding, head and norms keep their type.

Shape suffixes: T tokens, N output and K input features, G groups of inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from tpserve.model.checkpoint import SCHEMES
from tpserve.model.llama import Llama
from tpserve.model.quantized_format import FP8, FP8_MAX, GROUPS, Format, plain_format

__all__ = ["SCHEMES", "Float8Linear", "Int4Linear", "Int8Linear", "is_quantized", "quantize", "weight_bytes"]

# Rows of activations up to which torch's int8 product on a CPU is faster than widening and a bfloat16 product.
_INT8_TOKENS = 16
_PACKED_ROWS = 4096  # at a time; a multiple of the rows that torch packs together

logger = logging.getLogger(__name__)


class _ScaledLinear(nn.Module):
    """y = x · (q · scale)ᵀ with q [N, K] of the scheme's type and a float32 scale [N].

    Args:
        weight_NK: floating point.
    """

    scheme: str
    q_NK: torch.Tensor
    scale_N: torch.Tensor

    def __init__(self, weight_NK: torch.Tensor) -> None:
        super().__init__()
        form = Format(self.scheme)
        scale_N = form.scale_of(weight_NK)
        self._keep(form.quantise(weight_NK, scale_N), scale_N)

    @classmethod
    def of(cls, q_NK: torch.Tensor, scale_N: torch.Tensor) -> Self:
        """A layer of numbers that are quantised already."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._keep(q_NK, scale_N)
        return made

    def _keep(self, q_NK: torch.Tensor, scale_N: torch.Tensor) -> None:
        self.register_buffer("q_NK", q_NK)
        self.register_buffer("scale_N", scale_N)
        self._multiplies = self._has_product(q_NK.device, *q_NK.shape)

    def _has_product(self, device: torch.device, n: int, k: int) -> bool:
        raise NotImplementedError

    def dequantized(self) -> torch.Tensor:
        """The weight that this stands for, float32 [N, K]."""
        return Format(self.scheme).dequantise(self.q_NK, self.scale_N)

    def _widened(self, x_TK: torch.Tensor, q_NK: torch.Tensor) -> torch.Tensor:
        return (F.linear(x_TK, q_NK) * self.scale_N).to(x_TK.dtype)


class Int8Linear(_ScaledLinear):
    """See `_ScaledLinear`; q is int8."""

    scheme = "int8"

    def _has_product(self, device: torch.device, n: int, k: int) -> bool:
        # Of other sizes torch's product reads beyond the end, and the process dies (seen at K = 172).
        return device.type == "cpu" and n % 16 == 0 and k % 64 == 0

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        """[T, N] in x's type."""
        if self._multiplies and x_TK.dtype == torch.bfloat16 and x_TK.shape[0] <= _INT8_TOKENS:
            return torch._weight_int8pack_mm(x_TK, self.q_NK, self.scale_N.to(x_TK.dtype))
        return self._widened(x_TK, self.q_NK.to(x_TK.dtype))


class Float8Linear(_ScaledLinear):
    """See `_ScaledLinear`; q is float8_e4m3fn."""

    scheme = "fp8"

    def _has_product(self, device: torch.device, n: int, k: int) -> bool:
        # On a CPU torch's product takes as long as its widening, which is the longer part of it.
        newer = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
        return newer and n % 16 == 0 and k % 16 == 0

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        """[T, N] in x's type."""
        if self._multiplies and x_TK.dtype == torch.bfloat16:
            scale_T1 = x_TK.float().abs().amax(-1, keepdim=True) / FP8_MAX
            scale_T1 = torch.where(scale_T1 > 0, scale_T1, torch.ones_like(scale_T1))
            x8_TK = (x_TK / scale_T1).clamp(-FP8_MAX, FP8_MAX).to(FP8)
            return torch._scaled_mm(
                x8_TK, self.q_NK.t(), scale_a=scale_T1, scale_b=self.scale_N[None], out_dtype=x_TK.dtype
            )
        return self._widened(x_TK, _from_float8(self.q_NK, x_TK.dtype))


class Int4Linear(nn.Module):
    """y = x · (scale · q + zero)ᵀ with q from 0 to 15, and a scale and a zero for each group of inputs.

    On a CPU, in bfloat16, q and scales lie in the order and with the offset of 8 that torch's product wants. On a GPU a
    byte holds the inputs j and j + group / 2 of a group, and zeros are those of 128 + q (`kernels/int4.py`). Elsewhere
    both are as `quantized_format.py` says. So a layer stays on the kind of device that it was made on.

    Args:
        weight_NK: floating point.
        group: inputs that share a scale; divides K.
    """

    q_NK: torch.Tensor
    scale_GN2: torch.Tensor

    def __init__(self, weight_NK: torch.Tensor, group: int) -> None:
        super().__init__()
        form = Format("int4", group)
        scale_GN2 = form.scale_of(weight_NK)
        self._keep(form.quantise(weight_NK, scale_GN2), scale_GN2, group, weight_NK.dtype)

    @classmethod
    def of(cls, q_NK: torch.Tensor, scale_GN2: torch.Tensor, group: int, dtype: torch.dtype) -> Self:
        """A layer of numbers that are quantised already; `dtype` is the activations'."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._keep(q_NK, scale_GN2, group, dtype)
        return made

    def _keep(self, q_NK: torch.Tensor, scale_GN2: torch.Tensor, group: int, dtype: torch.dtype) -> None:
        self.group, self.shape = group, (q_NK.shape[0], 2 * q_NK.shape[1])
        # In float32 torch's product takes ten times as long as widening.
        self.packed = q_NK.device.type == "cpu" and q_NK.shape[0] % 16 == 0 and dtype == torch.bfloat16
        self.halved = q_NK.is_cuda
        if self.packed:
            q_NK, offset = _packed(q_NK), 8
        elif self.halved:
            q_NK, offset = in_halves(q_NK, group), -128
        else:
            offset = 0
        step_GN, zero_GN = scale_GN2.unbind(-1)
        self.register_buffer("q_NK", q_NK)
        self.register_buffer("scale_GN2", torch.stack([step_GN, zero_GN + offset * step_GN], -1))

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        """[T, N] in x's type."""
        if self.packed:
            scale = self.scale_GN2.to(x_TK.dtype)
            return _int4_product(x_TK.contiguous(), self.q_NK, self.group, scale)
        return F.linear(x_TK, self._widened(x_TK.dtype))

    def dequantized(self) -> torch.Tensor:
        """The weight that this stands for, float32 [N, K]."""
        if self.packed:
            identity = torch.eye(self.shape[1], dtype=torch.float32)
            return _int4_product(identity, self.q_NK, self.group, self.scale_GN2).t()
        return self._widened(torch.float32)

    def _widened(self, dtype: torch.dtype) -> torch.Tensor:
        if self.halved:
            return from_halves(self.q_NK, self.scale_GN2, self.group, dtype)
        return Format("int4", self.group).dequantise(self.q_NK, self.scale_GN2, dtype)


def in_halves(q_NK: torch.Tensor, group: int) -> torch.Tensor:
    """Bytes of inputs 2j and 2j + 1 → bytes of inputs j and j + group / 2 of each group."""
    bytes_NGP = q_NK.view(q_NK.shape[0], -1, group // 2)
    low, high = torch.stack([bytes_NGP & 15, bytes_NGP >> 4], -1).flatten(-2).chunk(2, -1)
    return (low | high << 4).view_as(q_NK)


def from_halves(q_NK: torch.Tensor, scale_GN2: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] of `in_halves`' bytes and of zeros of 128 + q, computed in float32; a few rows at a time."""
    out_NK = q_NK.new_empty(q_NK.shape[0], 2 * q_NK.shape[1], dtype=dtype)
    for first in range(0, len(q_NK), _PACKED_ROWS):
        rows = slice(first, first + _PACKED_ROWS)
        bytes_NGP = q_NK[rows].unflatten(1, (-1, group // 2))  # type: ignore[no-untyped-call]
        q_NGI = torch.cat([bytes_NGP & 15, bytes_NGP >> 4], -1).float() + 128
        scale_NG1, zero_NG1 = scale_GN2[:, rows].transpose(0, 1)[..., None].unbind(2)
        out_NK[rows] = (q_NGI * scale_NG1 + zero_NG1).flatten(1)
    return out_NK


def _packed(q_NK: torch.Tensor) -> torch.Tensor:
    """Bytes of two inputs each, in the order of torch's product on this CPU; a few rows at a time."""
    blocks = []
    for first in range(0, q_NK.shape[0], _PACKED_ROWS):
        rows = q_NK[first : first + _PACKED_ROWS]
        q = torch.stack([rows & 15, rows >> 4], -1).view(rows.shape[0], -1).to(torch.int32)
        blocks.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1))
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def _int4_product(x_TK: torch.Tensor, q: torch.Tensor, group: int, scale_GN2: torch.Tensor) -> torch.Tensor:
    y_TN: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_TK, q, group, scale_GN2)
    return y_TN


def _from_float8(q_NK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same numbers in `dtype`.

    On a CPU torch converts one number after the other. Sign, exponent and mantissa of float8_e4m3fn, moved to where
    bfloat16 has them, are the number times 2^-120 (exponents are biased by 7 and by 127).
    """
    if q_NK.device.type != "cpu":
        return q_NK.to(dtype)
    bits = q_NK.view(torch.int8).to(torch.int16)  # the sign is in the upper byte
    sign = bits & -0x8000
    bits.bitwise_and_(0x7F).bitwise_left_shift_(4).bitwise_or_(sign)
    return bits.view(torch.bfloat16).mul_(2.0**120).to(dtype)


@torch.no_grad()
def quantize(model: Llama, scheme: str) -> None:
    """Replaces the linear layers of the blocks, one by one: each gives its memory back before the next is made.

    Args:
        model: loaded, this rank's slices.
        scheme: one of `SCHEMES`.
    """
    kept: list[Sequence[int]] = []
    for block in model.layers:
        for part in (block.attention, block.feed_forward):
            for name, linear in list(part.named_children()):  # type: ignore[union-attr]
                made = _quantized(linear.weight, scheme)
                if made is None:
                    kept.append(linear.weight.shape)
                else:
                    setattr(part, name, made)
    if kept:
        logger.warning(
            "%d weights keep their type: %d does not divide the inputs of %s", len(kept), GROUPS[-1], kept[0]
        )


def _quantized(weight_NK: torch.Tensor, scheme: str) -> nn.Module | None:
    if scheme == "int8":
        return Int8Linear(weight_NK)
    if scheme == "fp8":
        return Float8Linear(weight_NK)
    form = plain_format(scheme, weight_NK.shape[1])
    return None if form is None else Int4Linear(weight_NK, form.group)


def is_quantized(model: Llama) -> bool:
    """Whether some of its linear layers have fewer bits."""
    return any(isinstance(module, _ScaledLinear | Int4Linear) for module in model.modules())


def has_integers(model: Llama) -> bool:
    """Whether some of its linear layers are int8 or int4."""
    return any(isinstance(module, Int8Linear | Int4Linear) for module in model.modules())


def weight_bytes(model: Llama) -> int:
    """What this rank's weights take."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - model.rope_PC2.nbytes

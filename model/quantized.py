"""Linear layers with fewer bits, made from a rank's own slices after they are loaded.

- `int8`: a scale an output feature; activations as they are (TensorRT-LLM's `--use_weight_only`, FasterTransformer's
  `int8_mode`).
- `int4`: a scale and a zero for every 128 inputs of an output feature, asymmetric; activations as they are.
- `fp8`: float8_e4m3fn with a scale an output feature; in bfloat16, activations are float8, too, with a scale a token.

Products are torch's own where it has them for the device and the type; elsewhere weights are widened for each product,
which saves memory but no time. Embedding, head and norms keep their type.

Shape suffixes: T tokens, N output and K input features, G groups of inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tpserve.model.llama import Llama

SCHEMES = ("int8", "int4", "fp8")
_GROUPS = (128, 64, 32)
_FP8, _FP8_MAX = torch.float8_e4m3fn, 448.0

logger = logging.getLogger(__name__)


class Int8Linear(nn.Module):
    """y = x · (q · scale)ᵀ with q int8 [N, K] and a float32 scale [N].

    Args:
        weight_NK: floating point.
    """

    q_NK: torch.Tensor
    scale_N: torch.Tensor

    def __init__(self, weight_NK: torch.Tensor) -> None:
        super().__init__()
        scale_N = _positive(weight_NK.float().abs().amax(1) / 127)
        self.register_buffer("q_NK", (weight_NK / scale_N[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale_N", scale_N)
        n, k = weight_NK.shape
        # Of other sizes torch's product reads beyond the end, and the process dies (seen at K = 172).
        self._multiplies = weight_NK.device.type == "cpu" and n % 16 == 0 and k % 64 == 0

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        """[T, N] in x's type."""
        q_NK, scale_N = self.q_NK, self.scale_N
        if self._multiplies and x_TK.dtype == torch.bfloat16:
            return torch._weight_int8pack_mm(x_TK, q_NK, scale_N.to(x_TK.dtype))
        return (F.linear(x_TK, q_NK.to(x_TK.dtype)) * scale_N).to(x_TK.dtype)

    def dequantized(self) -> torch.Tensor:
        """The weight that this stands for, float32 [N, K]."""
        return self.q_NK.float() * self.scale_N[:, None]


class Int4Linear(nn.Module):
    """y = x · (scale · q + zero)ᵀ with q from 0 to 15, and a scale and a zero for each group of inputs.

    Args:
        weight_NK: floating point.
        group: inputs that share a scale; divides K.
    """

    q_NK: torch.Tensor
    scale_GN2: torch.Tensor

    def __init__(self, weight_NK: torch.Tensor, group: int) -> None:
        super().__init__()
        n, k = weight_NK.shape
        grouped = weight_NK.float().view(n, k // group, group)
        low_NG, high_NG = grouped.amin(-1), grouped.amax(-1)
        scale_NG = _positive((high_NG - low_NG) / 15)
        q = ((grouped - low_NG[..., None]) / scale_NG[..., None]).round().clamp(0, 15)
        q_NK = q.to(torch.int32).view(n, k)
        self.group, self.shape = group, (n, k)
        self.packed = weight_NK.device.type == "cpu" and n % 16 == 0
        if self.packed:  # in the order and with the offset of 8 that torch's product wants
            q_NK = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q_NK, 1)
            scale_GN2 = torch.stack([scale_NG, low_NG + 8 * scale_NG], -1).transpose(0, 1).contiguous()
        else:
            q_NK = (q_NK[:, ::2] | q_NK[:, 1::2] << 4).to(torch.uint8)
            scale_GN2 = torch.stack([scale_NG, low_NG], -1).transpose(0, 1).contiguous()
        self.register_buffer("q_NK", q_NK)
        self.register_buffer("scale_GN2", scale_GN2)

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        """[T, N] in x's type."""
        if self.packed:
            scale = self.scale_GN2.to(x_TK.dtype)
            return _int4_product(x_TK.contiguous(), self.q_NK, self.group, scale)
        return F.linear(x_TK, self.dequantized().to(x_TK.dtype))

    def dequantized(self) -> torch.Tensor:
        """The weight that this stands for, float32 [N, K]."""
        n, k = self.shape
        if self.packed:
            identity = torch.eye(k, dtype=torch.float32)
            return _int4_product(identity, self.q_NK, self.group, self.scale_GN2).t()
        q = torch.stack([self.q_NK & 15, self.q_NK >> 4], -1).view(n, k // self.group, self.group)
        scale_NG2 = self.scale_GN2.transpose(0, 1)
        return (q * scale_NG2[..., :1] + scale_NG2[..., 1:]).view(n, k)


class Float8Linear(nn.Module):
    """y = x · (q · scale)ᵀ with q float8_e4m3fn [N, K] and a float32 scale [N].

    Args:
        weight_NK: floating point.
    """

    q_NK: torch.Tensor
    scale_N: torch.Tensor

    def __init__(self, weight_NK: torch.Tensor) -> None:
        super().__init__()
        scale_N = _positive(weight_NK.float().abs().amax(1) / _FP8_MAX)
        self.register_buffer("q_NK", (weight_NK / scale_N[:, None]).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8))
        self.register_buffer("scale_N", scale_N)
        device, (n, k) = weight_NK.device, weight_NK.shape
        multiplies = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)
        self._multiplies = multiplies and n % 16 == 0 and k % 16 == 0

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        """[T, N] in x's type."""
        if self._multiplies and x_TK.dtype == torch.bfloat16:
            scale_T1 = _positive(x_TK.float().abs().amax(-1, keepdim=True) / _FP8_MAX)
            x8_TK = (x_TK / scale_T1).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8)
            return torch._scaled_mm(
                x8_TK, self.q_NK.t(), scale_a=scale_T1, scale_b=self.scale_N[None], out_dtype=x_TK.dtype
            )
        return (F.linear(x_TK, self.q_NK.to(x_TK.dtype)) * self.scale_N).to(x_TK.dtype)

    def dequantized(self) -> torch.Tensor:
        """The weight that this stands for, float32 [N, K]."""
        return self.q_NK.float() * self.scale_N[:, None]


def _int4_product(x_TK: torch.Tensor, q: torch.Tensor, group: int, scale_GN2: torch.Tensor) -> torch.Tensor:
    y_TN: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_TK, q, group, scale_GN2)
    return y_TN


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """Scales of rows that are all zeros."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


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
            "%d weights keep their type: %d does not divide the inputs of %s", len(kept), _GROUPS[-1], kept[0]
        )


def _quantized(weight_NK: torch.Tensor, scheme: str) -> nn.Module | None:
    if scheme == "int8":
        return Int8Linear(weight_NK)
    if scheme == "fp8":
        return Float8Linear(weight_NK)
    group = next((group for group in _GROUPS if weight_NK.shape[1] % group == 0), None)
    return None if group is None else Int4Linear(weight_NK, group)


def is_quantized(model: Llama) -> bool:
    """Whether `quantize` has been here."""
    return any(isinstance(module, Int8Linear | Int4Linear | Float8Linear) for module in model.modules())


def weight_bytes(model: Llama) -> int:
    """What this rank's weights take."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - model.rope_PC2.nbytes

"""How a matrix is written with fewer bits: the numbers, and the parts of which a checkpoint keeps it.

- `int8`: q_NK int8 [N, K] and scale_N float32 [N]; the weight is q · scale.
- `fp8`: the same with q float8_e4m3fn.
- `int4`: q_NK uint8 [N, K / 2], the even input in the low four bits, and scale_GN2 float32 [G, N, 2]; of each group of
  inputs the weight is q · scale[..., 0] + scale[..., 1]. The step scale[..., 0], and what q = 8 stands for, are numbers
  that bfloat16 has, too (0.0998 of a normal weight's norm is lost, as without that), so that kernels whose weights are
  (q - 8) · step + eight in bfloat16 round once.

Shape suffixes: N output and K input features, G groups of inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from tpserve.model.checkpoint import SCHEMES
from tpserve.model.plan import PART_DIMS, tp_dim

GROUPS = (128, 64, 32)  # inputs that share a scale in int4, the first that divides K
FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
_BLOCK_ELEMENTS = 1 << 20  # worked on at a time, in float32


@dataclasses.dataclass(frozen=True)
class Format:
    """A scheme with its constants.

    Attributes:
        scheme: one of `SCHEMES`.
        group: inputs that share a scale; 0: all of a row (not int4).
    """

    scheme: str
    group: int = 0

    @property
    def scale_name(self) -> str:
        """Of the part that holds the scales."""
        return "scale_GN2" if self.group else "scale_N"

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of what stands for a weight [N, K], by name; scales come first."""
        n, k = shape
        if self.group:
            return {"scale_GN2": ((k // self.group, n, 2), torch.float32), "q_NK": ((n, k // 2), torch.uint8)}
        return {"scale_N": ((n,), torch.float32), "q_NK": ((n, k), torch.int8 if self.scheme == "int8" else FP8)}

    def slab(self, part: str, dim: int, lo: int, hi: int) -> tuple[int, int, int] | None:
        """What of a part the slab [lo, hi) of the weight along `dim` needs: (dimension, first, end); None: all of it.

        Ends are moved outwards to whole bytes and groups.
        """
        own = PART_DIMS[part][dim]
        if own is None:
            return None
        unit = 1 if dim == 0 or not self.group else 2 if part == "q_NK" else self.group
        return own, lo // unit, -(-hi // unit)

    def scale_of(self, weight_NK: torch.Tensor, *, older: bool = False) -> torch.Tensor:
        """The scales of whole rows and groups; older: as int4's were before they were bfloat16's numbers."""
        rows, columns = weight_NK.shape
        scale = torch.empty(self.parts((rows, columns))[self.scale_name][0], device=weight_NK.device)
        for lo, hi in _row_blocks(weight_NK):
            block = weight_NK[lo:hi].float()
            if self.group:
                low_NG, high_NG = block.view(hi - lo, -1, self.group).aminmax(dim=-1)
                step_NG = (high_NG - low_NG) / 15
                eight_NG = low_NG + 8 * step_NG
                if not older:
                    eight_NG = eight_NG.bfloat16().float()
                    # All numbers are within half a step of one of the sixteen, though the eight has moved.
                    above_NG, below_NG = (high_NG - eight_NG) / 7.5, (eight_NG - low_NG) / 8.5
                    step_NG = torch.maximum(step_NG, torch.maximum(above_NG, below_NG)).bfloat16().float()
                    # Equal inputs become eights: their zero is exact, whatever the step.
                    step_NG = torch.where(step_NG > 0, step_NG, eight_NG.abs())
                step_NG = _positive(step_NG)
                zero_NG = low_NG if older else eight_NG - 8 * step_NG
                scale[:, lo:hi] = torch.stack([step_NG, zero_NG], -1).transpose(0, 1)
            else:
                scale[lo:hi] = _positive(block.abs().amax(1) / (127 if self.scheme == "int8" else FP8_MAX))
        return scale

    def quantise(self, weight_NK: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The q of whole groups with their scales."""
        shape, dtype = self.parts(tuple(weight_NK.shape))["q_NK"]
        q_NK = torch.empty(shape, dtype=dtype, device=weight_NK.device)
        for lo, hi in _row_blocks(weight_NK):
            block = weight_NK[lo:hi].float()
            if self.group:
                step_NG1, low_NG1 = scale[:, lo:hi].transpose(0, 1)[..., None].unbind(2)
                grouped = (block.view(hi - lo, -1, self.group) - low_NG1) / step_NG1
                q = grouped.round_().clamp_(0, 15).to(torch.uint8).view(hi - lo, -1)
                q_NK[lo:hi] = q[:, ::2] | q[:, 1::2] << 4
                continue
            block = block / scale[lo:hi, None]
            block = block.round_().clamp_(-127, 127) if self.scheme == "int8" else block.clamp_(-FP8_MAX, FP8_MAX)
            q_NK[lo:hi] = block.to(dtype)
        return q_NK

    def dequantise(
        self, q_NK: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32, skip: int = 0
    ) -> torch.Tensor:
        """The weight, [N, K], computed in float32 and rounded to `dtype`.

        Args:
            q_NK: from its own scales' first group on, or from within it.
            scale: see the top of this file.
            dtype: of the result.
            skip: inputs of the first group that `q_NK` lacks; even.
        """
        rows, columns = q_NK.shape[0], q_NK.shape[1] * (2 if self.group else 1)
        out = torch.empty(rows, columns, dtype=dtype, device=q_NK.device)
        for lo, hi in _row_blocks(out):
            if not self.group:
                out[lo:hi] = q_NK[lo:hi].float() * scale[lo:hi, None]
                continue
            q = torch.stack([q_NK[lo:hi] & 15, q_NK[lo:hi] >> 4], -1).view(hi - lo, columns)
            if skip == 0 and columns % self.group == 0:
                step_NG1, low_NG1 = scale[:, lo:hi].transpose(0, 1)[..., None].unbind(2)
                out[lo:hi] = (q.view(hi - lo, -1, self.group) * step_NG1 + low_NG1).view(hi - lo, columns)
            else:
                group_K = torch.arange(skip, skip + columns, device=q.device) // self.group
                step_NK, low_NK = scale[group_K, lo:hi].transpose(0, 1).unbind(2)
                out[lo:hi] = q * step_NK + low_NK
        return out


def format_of(name: str, shape: tuple[int, ...], scheme: str) -> Format | None:
    """How a parameter is quantised; None: it stays as it is.

    Embedding, head and norms do; in int4 a matrix whose inputs no size of group divides, too.

    Args:
        name: of the parameter.
        shape: of the whole parameter.
        scheme: one of `SCHEMES`.
    """
    assert scheme in SCHEMES
    if not name.startswith("layers.") or tp_dim(name) is None:
        return None
    return plain_format(scheme, shape[1])


def plain_format(scheme: str, num_inputs: int) -> Format | None:
    """How a matrix of so many input features is quantised; None: no size of group divides them."""
    if scheme != "int4":
        return Format(scheme)
    group = next((group for group in GROUPS if num_inputs % group == 0), None)
    return None if group is None else Format(scheme, group)


def finer_group(group: int, lo: int, hi: int) -> int | None:
    """The largest groups, of those into which `group` divides, that the inputs [lo, hi) consist of; None: none."""
    return next((finer for finer in GROUPS if group % finer == lo % finer == hi % finer == 0), None)


def _row_blocks(weight_NK: torch.Tensor) -> Iterator[tuple[int, int]]:
    rows, columns = weight_NK.shape
    step = max(1, _BLOCK_ELEMENTS // max(1, columns))
    for lo in range(0, rows, step):
        yield lo, min(lo + step, rows)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """Scales of rows that are all zeros become one."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))

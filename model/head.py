"""The head's product on CUDA, whose sums stay float32.

As bfloat16, logits from 16 to 32 would be multiples of 1/8: some of the most probable tokens would be equal that are
not, and a greedy choice among them one by number.
"""

from __future__ import annotations

import torch


def head_product(x_ND: torch.Tensor, weight_VD: torch.Tensor, out_NV: torch.Tensor | None = None) -> torch.Tensor:
    """x · wᵀ; float32 [N, V].

    Args:
        x_ND: normed rows: bfloat16, float16 or float32.
        weight_VD: of the head, of the same type.
        out_NV: float32, where to; None: new memory.
    """
    if x_ND.dtype == torch.float32:
        return torch.mm(x_ND, weight_VD.t(), out=out_NV)
    if out_NV is None:
        return torch.mm(x_ND, weight_VD.t(), out_dtype=torch.float32)
    return torch.mm(x_ND, weight_VD.t(), out_dtype=torch.float32, out=out_NV)

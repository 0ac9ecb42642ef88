"""Memory of each rank that all ranks of its group reach: torch's symmetric memory."""

from __future__ import annotations

import os
from typing import Any

import torch

from tpserve.model.parallel import TensorParallel


def reachable(
    tp: TensorParallel, *shape: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    """Zeros, as many on each rank.

    Args:
        tp: the group, of two ranks at least, all of which call this.
        shape: of this rank's tensor.
        dtype: of its elements.
        device: of this rank.

    Returns:
        the tensor, and what knows the others' (`buffer_ptrs`, `get_buffer`) and makes barriers; it keeps them mapped.

    Raises:
        RuntimeError: the ranks cannot reach each other's memory.
    """
    # Multicast objects are not needed, and creating them can disturb other users of the switch.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    from torch.distributed import _symmetric_memory as symmetric_memory

    assert tp.group is not None
    tensor = symmetric_memory.empty(*shape, dtype=dtype, device=device)
    tensor.zero_()
    return tensor, symmetric_memory.rendezvous(tensor, tp.group)

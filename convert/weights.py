"""What writers see of a checkpoint, whatever it was read from: named tensors in Meta's layout, read slab by slab."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from tpserve.convert.errors import ConvertError

# How much a writer reads at a time, in bytes.
BLOCK_BYTES = 16 << 20


class Weight(Protocol):
    """One parameter of the model: Meta's name, and its whole shape."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, dim: int, lo: int, hi: int, dtype: torch.dtype) -> torch.Tensor:
        """Copies the slab [lo, hi) along `dim` into a new contiguous tensor of `dtype`, in bounded memory."""
        ...


def layer_of(name: str) -> str:
    """`layers.3.attention.wq.weight` → `layers.3`, `output.weight` → `output`: the stem of the file that holds it."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]


def stored_dtype(tensor: Weight, dtype: torch.dtype) -> torch.dtype:
    """Of a tensor in the written files: a part of a quantised weight has one of its own, others the checkpoint's."""
    own: torch.dtype = getattr(tensor, "stored_dtype", dtype)
    return own


def read_slab(tensor: Weight, dim: int, lo: int, hi: int, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.read`, but nothing becomes infinite on the way.

    Raises:
        ConvertError: a value does not fit into `dtype`; the message names the weight.
    """
    data = tensor.read(dim, lo, hi, dtype)
    # bfloat16 and float32 reach far beyond float16's 65504: rather stop than store infinities.
    if dtype == torch.float16 and not torch.isfinite(data).all():
        exact = tensor.read(dim, lo, hi, torch.float32)
        if not torch.equal(torch.isfinite(exact), torch.isfinite(data)):
            raise ConvertError(f"{tensor.name} has values that float16 cannot hold; convert with --dtype bfloat16")
    return data


def row_blocks(
    tensor: Weight, dtype: torch.dtype, *, rows: tuple[int, int] | None = None, unit: int = 1
) -> Iterator[torch.Tensor]:
    """Rows of a parameter in order, in blocks of about `BLOCK_BYTES`.

    Args:
        tensor: the parameter.
        dtype: of the blocks.
        rows: half-open bounds; None: all.
        unit: a block holds a multiple of so many rows, which must divide their number.

    Raises:
        ConvertError: see `read_slab`.
    """
    first, end = rows or (0, tensor.shape[0])
    row_bytes = dtype.itemsize * torch.Size(tensor.shape[1:]).numel()
    step = max(1, BLOCK_BYTES // (row_bytes * unit)) * unit
    for lo in range(first, end, step):
        yield read_slab(tensor, 0, lo, min(lo + step, end), dtype)


def raw_bytes(data: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy (little-endian, as every machine that torch runs on)."""
    raw: Any = data.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)

"""Where a CPU model's weights lie: one block of memory, in the order in which a step reads them, in huge pages.

A step reads every weight once. In pages of 4 KiB much of its time goes into finding them: two cores read 220 MB 1.3 to
1.45 times as fast in pages of 2 MiB.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from tpserve.model.llama import Llama, TransformerBlock

_ALIGNMENT = 64  # bytes: a cache line


@torch.no_grad()
def consolidate(model: Llama) -> None:
    """Moves all weights into such a block; each gives its own memory back when it has moved.

    Matrices that read the same input come one below the other (`stacked`).

    Args:
        model: on the CPU.
    """
    places: list[tuple[nn.Module, str, torch.Tensor]] = []
    for parts in _reading_order(model):
        named = [dict((*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))) for part in parts]
        names = dict.fromkeys(name for tensors in named for name in tensors)
        places += [(part, name, tensors[name]) for name in names
                   for part, tensors in zip(parts, named, strict=True) if name in tensors]  # fmt: skip
    offsets: dict[int, int] = {}  # tied weights are one tensor, and stay one
    size = 0
    for _, _, tensor in places:
        if id(tensor) not in offsets:
            offsets[id(tensor)] = size
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    block = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without: ordinary pages
            block.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(block, dtype=torch.uint8)  # holds on to the block
    moved: dict[int, torch.Tensor] = {}
    for i, (part, name, tensor) in enumerate(places):
        at = offsets[id(tensor)]
        if id(tensor) not in moved:
            view = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            moved[id(tensor)] = view.copy_(tensor)
        if isinstance(tensor, nn.Parameter):
            tensor.data = moved[id(tensor)]
        else:
            setattr(part, name, moved[id(tensor)])
            places[i] = part, name, moved[id(tensor)]  # lets go of the old one


def stacked(*weights: torch.Tensor) -> torch.Tensor:
    """Matrices, or their scales, that `consolidate` has laid one below the other, as one.

    Args:
        weights: [N, …] each.

    Raises:
        ValueError: they do not lie so.
    """
    first = weights[0]
    end = first.data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or not weight.is_contiguous():
            raise ValueError("the matrices do not lie one below the other")
        end += weight.nbytes
    return first.detach().as_strided((sum(len(weight) for weight in weights), *first.shape[1:]), first.stride())


def _reading_order(model: Llama) -> Iterator[tuple[nn.Module, ...]]:
    """All parts that have weights; those that read the same input together."""
    yield (model.tok_embeddings,)
    for layer in model.layers:
        block = cast(TransformerBlock, layer)
        attention, ffn = block.attention, block.feed_forward
        yield from ((block.attention_norm,), (attention.wq, attention.wk, attention.wv), (attention.wo,))
        yield from ((block.ffn_norm,), (ffn.w1, ffn.w3), (ffn.w2,))
    yield from ((model.norm,), (model.output,))

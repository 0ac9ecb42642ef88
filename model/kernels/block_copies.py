"""Tiles of keys and values from the paged cache by Hopper's copy engine: of `prefill_hopper.py` and `decode_hopper.py`.

A tile comes in copies of 16 tokens, a block of the cache or a part of one, by 64 numbers, as far as the engine swaps
banks for a reader. In shared memory they lie as one tile [KEYS, E] of the ring's layout.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

COPY = gl.constexpr(16)  # tokens of a copy
_WIDTH = gl.constexpr(64)  # its numbers
_NOWHERE = gl.constexpr(0x7FFFFF00)  # a row behind any cache: zeros are copied
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # before and since Triton 3.7


@gluon.jit
def places(table_ptr, at, end, there, BLOCK: gl.constexpr, KEYS: gl.constexpr):
    """Where in the cache the 16s of a tile of keys begin; there: of masks, whether there is such a tile."""
    starts = ()
    for c in gl.static_range(KEYS // COPY):
        pos = at + COPY * c
        block = gl.load(table_ptr + pos // BLOCK, mask=there & (pos < end), other=0).to(gl.int32)
        starts += (gl.where(pos < end, block * BLOCK + pos % BLOCK, _NOWHERE),)  # type: ignore[assignment]
    return starts


@gluon.jit
def parts_of(ring, ENTRIES: gl.constexpr, KEYS: gl.constexpr, E: gl.constexpr, desc):
    """A ring [ENTRIES, KEYS, E] as what single copies write; which is whose: `part`."""
    return ring._reinterpret(desc.dtype, [ENTRIES * E * KEYS // (_WIDTH * COPY), COPY, _WIDTH], desc.layout)


@gluon.jit
def part(slot, half, c, KEYS: gl.constexpr, E: gl.constexpr):
    """Of `parts_of`, the one of the 64 numbers `half` of the 16 tokens `c` of an entry."""
    return (slot * (E // _WIDTH) + half) * (KEYS // COPY) + c


@gluon.jit
def copy_tile(desc, starts, column, ring, slot, full, ENTRIES: gl.constexpr, KEYS: gl.constexpr, E: gl.constexpr,
              at=None, end=None):  # fmt: skip
    """Asks for a tile; with `at`, its first key, and `end`: without the 16 tokens that a sequence ends in, if it does
    not fill them."""
    parts = parts_of(ring, ENTRIES, KEYS, E, desc)
    for c in gl.static_range(KEYS // COPY):
        for half in gl.static_range(E // _WIDTH):
            into = parts.index(part(slot, half, c, KEYS, E))
            if end is None:
                tma.async_copy_global_to_shared(desc, [starts[c], column + half * _WIDTH], full, into)
            else:
                pos = at + COPY * c
                wanted = (pos >= end) | (pos + COPY <= end)
                tma.async_copy_global_to_shared(desc, [starts[c], column + half * _WIDTH], full, into, pred=wanted)


def descriptors(*caches: torch.Tensor) -> list[TensorDescriptor]:
    """What the copy engine is told of caches [slots, K, E]."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return [
        TensorDescriptor(cache.flatten(1), [len(cache), cache[0].numel()], [cache[0].numel(), 1],
                         [COPY.value, _WIDTH.value], layout)
        for cache in caches
    ]  # fmt: skip

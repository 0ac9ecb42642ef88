"""Triton kernels of the CUDA path. This package itself imports no Triton: a machine without it can ask `supports`."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

import torch

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(device: torch.device, dtype: torch.dtype, n_heads: int, n_kv_heads: int, head_dim: int) -> bool:
    """Whether the attention kernels take this model; if not, `tpserve.model.attention` is the way.

    Args:
        n_heads, n_kv_heads: of one rank.
    """
    return (
        device.type == "cuda"
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)  # bf16 on the tensor cores, cp.async
        and dtype in _DTYPES
        and n_heads % n_kv_heads == 0
        and n_heads // n_kv_heads <= 64  # the query heads of a key/value head are rows of one tile
        and head_dim % 2 == 0
        and head_dim <= 256
    )


@functools.cache
def has_gluon() -> bool:
    """Whether `stream.py`, `prefill_hopper.py`, `decode_hopper.py`, `rows_product.py` and `rows_pairs.py` compile:
    Gluon, in which they are written, is still in motion from version to version."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    return version.split(".")[:2] in (["3", "6"], ["3", "7"])


def hopper_takes(k_cache: torch.Tensor, dtype: torch.dtype, block_size: int) -> bool:
    """Whether `prefill_hopper.py` and `decode_hopper.py` can attend to this cache, with queries of this type."""
    return (
        has_gluon()
        and dtype in (torch.bfloat16, torch.float16)
        and k_cache.dtype == dtype
        and k_cache.shape[2] in (64, 128)
        and block_size % 16 == 0
        and is_hopper(k_cache.device)
    )


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Asked at every launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9

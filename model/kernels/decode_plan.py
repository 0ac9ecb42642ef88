"""How the work of decode attention is cut into programs, for `paged_attention.py` and `decode_hopper.py`, whose names
these are."""

from __future__ import annotations

import dataclasses
import functools

import torch

from tpserve.model.kernels import hopper_takes

_MAX_PARTS = 64  # of a sequence: to add them up takes time, too
LONG = 1024  # keys of an item, from which on there may be more parts
_MANY = 2048  # pairs of a sequence and a key/value head: one tile fewer in flight is as fast, and leaves room
_FEW = 128  # programs: small tiles in flight would not keep the memory busy


@dataclasses.dataclass(frozen=True)
class Config:
    """How a launch is cut.

    Attributes:
        keys: of a tile.
        warps: of a program.
        stages: tiles in flight, and one.
        least: keys that an item has at least.
        programs: a processor, of the items that lengths are cut into.
        hopper: made by `decode_hopper.py`; programs are one warp there.
    """

    keys: int
    warps: int
    stages: int
    least: int
    programs: int
    hopper: bool = False


@dataclasses.dataclass(frozen=True)
class DecodeScratch:
    """What programs of one launch tell each other; launches that may run at the same time need one each.

    Attributes:
        partial: float32 [items, H, E], softmax-weighted values of an item.
        lse: float32 [items, H], log2 of the sum of its exponentials.
        arrived: int32 [S, K], zero between launches.
    """

    partial: torch.Tensor
    lse: torch.Tensor
    arrived: torch.Tensor


def decode_scratch(max_S: int, H: int, E: int, max_items: int, device: torch.device) -> DecodeScratch:
    """Scratch for launches of up to `max_S` sequences and `max_items` items."""
    return DecodeScratch(
        partial=torch.empty(max_items, H, E, dtype=torch.float32, device=device),
        lse=torch.empty(max_items, H, dtype=torch.float32, device=device),
        arrived=torch.zeros(max_S, H, dtype=torch.int32, device=device),
    )


@functools.cache
def _has_room(device: torch.device) -> bool:
    """For programs of up to 226 KiB of shared memory: of Hopper's and of servers' Blackwell GPUs there are 227."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def choose_config(S: int, G: int, k_cache: torch.Tensor, dtype: torch.dtype, block_size: int) -> Config:
    """As measured on an H200. One warp needs no barriers. Where there is room, as many programs as fit: fewer crowd
    on the processors that the kernel before leaves first. Items are added up in the time of some hundred keys."""
    if dtype == torch.float32:
        return Config(16, 4, 1, 16 * max(1, G // 2), 2)
    _, K, E = k_cache.shape
    if G <= 16 and hopper_takes(k_cache, dtype, block_size):  # more heads' sums do not fit in a warp's registers
        return Config(32, 1, 3, 128, 4, True)
    if E > 128 or not _has_room(k_cache.device) or (k_cache.dtype == torch.float8_e4m3fn and S > 1):
        return Config(32, 1, 3, 32 * max(1, G // 2), 2)
    if S * K * max_parts(G) < _FEW:
        return Config(128, 4, 3, 128 if G == 1 else 256, 1)
    return Config(32, 1, 4 if S * K < _MANY else 3, 128, 4)


def padded_sequences(S: int) -> int:
    """The kernels are compiled anew for each: a lane has one sequence, or several."""
    return 1 if S == 1 else max(32, 1 << (S - 1).bit_length())


def decode_variants(max_S: int, H: int, k_cache: torch.Tensor, dtype: torch.dtype, block_size: int) -> list[int]:
    """Numbers of sequences, one for each variant that the kernel is compiled in for up to `max_S` of them."""
    G = H // k_cache.shape[1]
    first: dict[object, int] = {}
    for S in range(1, max_S + 1):
        first.setdefault((padded_sequences(S), choose_config(S, G, k_cache, dtype, block_size)), S)
    return list(first.values())


def max_parts(G: int) -> int:
    """A program that adds up G heads of many parts takes longer than their keys took."""
    return _MAX_PARTS if G == 1 else _MAX_PARTS // 2


def tries(S: int) -> int:
    """Longer stretches to try, for items that run all at a time; where sequences are many it is not so important."""
    return 4 if 1 < S <= 64 else 0


def choose_items(
    S: int, H: int, k_cache: torch.Tensor, dtype: torch.dtype, block_size: int, max_len: int, num_sms: int
) -> int:
    """Items of a graph captured for S sequences of up to `max_len` keys: as many as all processors take at a time, at
    least one a sequence, and one a sequence more for rounding up."""
    K = k_cache.shape[1]
    config = choose_config(S, H // K, k_cache, dtype, block_size)
    a_sequence = min(-(-max_len // config.least), max_parts(H // K))
    return max(S, min(config.programs * num_sms // K, S * a_sequence)) + (S if S > 1 else 0)

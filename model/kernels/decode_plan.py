"""How the work of decode attention is cut, for `paged_attention.py` and `decode_hopper.py`, whose names these are.

One program takes one *item*: a stretch of one sequence's keys, for the G query heads of one key/value head. How long a
stretch is follows from the lengths, which only the device knows: a CUDA graph captured once serves every mix of
lengths, and a long sequence beside short ones is cut into more items. There are to be no more of them than programs run
at a time, if stretches that are up to half as long again will do it. A graph has a program for every item that there
may be; those without one come first, and are gone before the kernel in front has ended. Behind them come the items of
the longest sequences. All layers of a step have the same items: they are dealt once.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from tpserve.model.kernels import hopper_takes

ITEM = 8  # int32 that say what an item is
_MAX_PARTS = 64  # of a sequence: to add them up takes time, too
_LONG = 1024  # keys of an item, from which on there may be more parts
_TRIES = 4  # lengths of a stretch, up to half as long again
_MANY = 2048  # pairs of a sequence and a key/value head: one tile fewer in flight is as fast, and leaves room
_FEW = 128  # programs: small tiles in flight would not keep the memory busy


@dataclasses.dataclass(frozen=True)
class Config:
    """What a program is.

    Attributes:
        keys: of a tile.
        warps: of a program.
        stages: tiles in flight, and one; with `hopper`, of the ring.
        least: keys that an item has at least; a multiple of `keys`.
        programs: that run on a processor at a time.
        hopper: made by `decode_hopper.py`; programs are one warp there.
    """

    keys: int
    warps: int
    stages: int
    least: int
    programs: int
    hopper: bool = False


@dataclasses.dataclass(frozen=True)
class Cut:
    """How steps of S sequences are cut.

    Attributes:
        config: of the programs.
        slots: items that run at a time, or S, if that is more.
        items: that there may be.
        parts: of a sequence, at most, as long as they have no more than `_LONG` keys.
    """

    config: Config
    slots: int
    items: int
    parts: int


@dataclasses.dataclass(frozen=True)
class DecodeScratch:
    """What programs are told, and tell each other; launches that may run at the same time need one each.

    Attributes:
        items_I8: int32 [items, 8]: an item's sequence (-1: there is no such item), its row in the block tables, its
            first key, the key behind its last, the sequence's length, its number of items and the first one's number.
        partial: float32 [items, H, E], softmax-weighted values of an item.
        lse: float32 [items, H], log2 of the sum of its exponentials.
        arrived: int32 [S, H], zero between launches; of each sequence's items, how many are done.
    """

    items_I8: torch.Tensor
    partial: torch.Tensor
    lse: torch.Tensor
    arrived: torch.Tensor


def decode_scratch(max_S: int, H: int, E: int, max_items: int, device: torch.device) -> DecodeScratch:
    """Scratch for launches of up to `max_S` sequences and `max_items` items."""
    return DecodeScratch(
        items_I8=torch.empty(max_items, ITEM, dtype=torch.int32, device=device),
        partial=torch.empty(max_items, H, E, dtype=torch.float32, device=device),
        lse=torch.empty(max_items, H, dtype=torch.float32, device=device),
        arrived=torch.zeros(max_S, H, dtype=torch.int32, device=device),
    )


@functools.cache
def _has_room(device: torch.device) -> bool:
    """For programs of up to 226 KiB of shared memory: of Hopper's and of servers' Blackwell GPUs there are 227."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def _choose_config(S: int, G: int, k_cache: torch.Tensor, dtype: torch.dtype, block_size: int) -> Config:
    """As measured on an H200. One warp waits for no other. Where there is room, as many programs as fit: fewer crowd
    on the processors that the kernel before leaves first. Items are added up in the time of some hundred keys."""
    if dtype == torch.float32:
        return Config(16, 4, 1, 16 * max(1, G // 2), 2)
    _, K, E = k_cache.shape
    if G <= 16 and hopper_takes(k_cache, dtype, block_size):  # more heads' sums do not fit in a warp's registers
        if S * K < 64:
            return Config(64, 1, 3, 128, 2, True)
        if S * K > 4096 or (G == 1 and S * K <= 256):
            return Config(32, 1, 2, 64, 6, True)
        return Config(64, 1, 2, 128, 3, True) if S * K <= 128 else Config(32, 1, 3, 128, 4, True)
    if E > 128 or not _has_room(k_cache.device) or (k_cache.dtype == torch.float8_e4m3fn and S > 1):
        return Config(32, 1, 3, 32 * max(1, G // 2), 2)
    if S * K * _max_parts(G) < _FEW:
        return Config(128, 4, 3, 128 if G == 1 else 256, 1)
    return Config(32, 1, 4 if S * K < _MANY else 3, 128, 4)


def _max_parts(G: int) -> int:
    """A program that adds up G heads of many parts takes longer than their keys took."""
    return _MAX_PARTS if G == 1 else _MAX_PARTS // 2


def choose_cut(
    S: int, H: int, k_cache: torch.Tensor, dtype: torch.dtype, block_size: int, max_len: int, num_sms: int
) -> Cut:
    """For steps of S sequences of up to `max_len` keys."""
    K = k_cache.shape[1]
    config, parts = _choose_config(S, H // K, k_cache, dtype, block_size), _max_parts(H // K)
    fitting = max(1, config.programs * num_sms // K)
    slots = max(S, min(fitting, S * min(-(-max_len // config.least), parts)))
    # Lengths divided by a stretch are rounded up, which makes one item a sequence more at most. Where sequences are
    # many, only those of several times the mean are cut: programs without an item take time, too.
    return Cut(config, slots, slots + min(S, 2 * fitting) if S > 1 else slots, parts)


def decode_variants(max_S: int, H: int, k_cache: torch.Tensor, dtype: torch.dtype, block_size: int) -> list[int]:
    """Numbers of sequences, one for each variant that the kernels are compiled in for up to `max_S` of them."""
    G = H // k_cache.shape[1]
    first: dict[object, int] = {}
    for S in range(1, max_S + 1):
        first.setdefault((_padded(S), _choose_config(S, G, k_cache, dtype, block_size)), S)
    return list(first.values())


def _padded(S: int) -> int:
    """Compiled anew for each."""
    return max(32, 1 << (S - 1).bit_length())


@triton.jit(do_not_specialize=["rows_ptr", "positions_ptr", "num_seqs", "shares", "slots", "num_items"])
def _deal_kernel(
    rows_ptr, positions_ptr, items_ptr, num_seqs, shares, slots, num_items, SP: tl.constexpr, BN: tl.constexpr,
    LEAST: tl.constexpr, PARTS: tl.constexpr, LONG: tl.constexpr, TRIES: tl.constexpr, ITEM: tl.constexpr,
):  # fmt: skip
    """The items of one sequence."""
    own, seqs, lane = tl.program_id(0), tl.arange(0, SP), tl.arange(0, 32)
    lens = tl.load(positions_ptr + seqs, mask=seqs < num_seqs, other=-1).to(tl.int32) + 1
    row = tl.load(rows_ptr + own).to(tl.int32)
    # 64 bits: 1024 sequences of a million tokens are 2^30 keys.
    total = tl.sum(lens.to(tl.int64), 0)
    shortest = tl.maximum((tl.cdiv(total, shares * BN) * BN).to(tl.int32), LEAST)
    shortest = tl.maximum(shortest, tl.minimum(tl.cdiv(tl.max(lens, 0), PARTS * BN) * BN, LONG))
    stretch = shortest
    for i in tl.static_range(TRIES + 1):  # the longest first
        longer = tl.cdiv(shortest + shortest // (2 * TRIES) * (TRIES - i), BN) * BN
        count = tl.sum(tl.where(seqs < num_seqs, tl.maximum(tl.cdiv(lens, longer), 1), 0), 0)
        stretch = tl.where(count <= slots, longer, stretch)
    # Padding has one item too: somebody has to write its zeros.
    counts = tl.where(seqs < num_seqs, tl.maximum(tl.cdiv(lens, stretch), 1), 0)
    length, splits = tl.sum(tl.where(seqs == own, lens, 0), 0), tl.sum(tl.where(seqs == own, counts, 0), 0)
    without = num_items - tl.sum(counts, 0)
    first = without + tl.sum(tl.where((lens > length) | ((lens == length) & (seqs < own)), counts, 0), 0)
    each = tl.cdiv(length, splits * BN) * BN
    for at in tl.range(0, splits, 32):
        part = at + lane
        item_ptr, there = items_ptr + (first + part) * ITEM, part < splits
        tl.store(item_ptr, own + part * 0, mask=there)
        tl.store(item_ptr + 1, row + part * 0, mask=there)
        tl.store(item_ptr + 2, part * each, mask=there)
        tl.store(item_ptr + 3, tl.minimum(part * each + each, length), mask=there)
        tl.store(item_ptr + 4, length + part * 0, mask=there)
        tl.store(item_ptr + 5, splits + part * 0, mask=there)
        tl.store(item_ptr + 6, first + part * 0, mask=there)
    for at in tl.range(own * 32, without, num_seqs * 32):
        tl.store(items_ptr + (at + lane) * ITEM, lane * 0 - 1, mask=at + lane < without)


def deal(cut: Cut, scratch: DecodeScratch, rows_S: torch.Tensor, positions_S: torch.Tensor) -> None:
    """Writes the items of a step; nothing here waits for the device.

    Args:
        cut: of this many sequences.
        rows_S: each one's row in the block tables, int32 or int64.
        positions_S: of the tokens that attend, int32 or int64: they see as many keys, and their own. -1: padding.
    """
    S, config = len(rows_S), cut.config
    _deal_kernel[(S,)](
        rows_S, positions_S, scratch.items_I8, S, cut.items if S == 1 else max(1, cut.items - S), cut.slots, cut.items,
        SP=_padded(S), BN=config.keys, LEAST=config.least, PARTS=cut.parts, LONG=_LONG, TRIES=_TRIES, ITEM=ITEM,
        num_warps=1,
    )  # fmt: skip

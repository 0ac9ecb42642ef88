"""How `rows_product.py`'s and `rows_pairs.py`'s products are cut.

Shape suffixes: S rows of the step, N output and K input features.
"""

from __future__ import annotations

import dataclasses

MAX_ROWS = 64  # with more, products of 16 bits are cuBLAS's, but for
_FEWEST_OF_MANY, MOST_ROWS = 112, 128
INT4_GROUP = 128  # inputs that share a scale and a zero; others have no kernel here
SPAN_BYTES = 128  # of a weight's row in a tile: as far as the copy engine swaps banks
_ROOM = 225 << 10  # bytes of a processor's shared memory
_MAX_ENTRIES = 12
_FEWEST, _MOST = 0.7, 2.75  # programs, of the processors: fewer would not keep the memory busy
_MOST_OF_BYTES = 3


@dataclasses.dataclass(frozen=True)
class RowsTile:
    """How a product is cut.

    Attributes:
        rows: of the weight.
        parts: of its sums.
        entries: of the ring.
    """

    rows: int
    parts: int
    entries: int


def choose_rows_tile(
    S: int,
    N: int,
    K: int,
    processors: int,
    *,
    bits: int = 16,
    in_parts: bool = False,
    with_end: bool = False,
    torchs: bool = False,
) -> RowsTile | None:
    """As measured on an H200, with 7B's shapes; None: another kernel is the way.

    Args:
        S: of the step.
        N, K: of the weight.
        processors: of the device.
        bits: of the weight's numbers.
        in_parts: whether the sums may be left in parts.
        with_end: whether the product saves SiLU's pass over twice its outputs.
        torchs: whether torch multiplies weights of 8 bits as they are.
    """
    if not 0 < S <= MOST_ROWS or K * bits % 128:
        return None
    # Above 64, 128 rows are computed of any number: that pays where it is not many more, or the others are slow.
    saves = in_parts or (with_end and bits > 8)
    if S > MAX_ROWS and ((bits > 8 and S < _FEWEST_OF_MANY) or ((bits > 8 or torchs) and not saves)):
        return None
    # With many rows, large tiles, which read them less often, if all run at a time with a processor each.
    wide = not in_parts and (32 if bits > 8 else MAX_ROWS) < S and _FEWEST * processors <= N // 128 <= processors
    if bits > 8:
        return _cut(S, N, K, processors, 128 if wide or _MOST * processors < N // 64 else 64, bits, in_parts)
    # The ring of few bits is rows of x for the most part, for which small tiles may not leave it the room.
    small = None if wide else _cut(S, N, K, processors, 64, bits, in_parts)
    return small or _cut(S, N, K, processors, 128, bits, in_parts)


def _cut(S: int, N: int, K: int, processors: int, rows: int, bits: int, in_parts: bool) -> RowsTile | None:
    """Tiles of so many of the weight's rows; None: they do not divide it, or do not fit."""
    depth, most, many = SPAN_BYTES * 8 // bits, _MOST if bits > 8 else _MOST_OF_BYTES, S > MAX_ROWS
    if N % rows:
        return None
    tiles, steps = N // rows, -(-K // depth)  # beyond the end come zeros
    parts, fewest = 1, 3 if bits > 8 or (bits > 4 and not many) else 2  # entries
    if in_parts:  # for each processor, so many programs; for widening waits for tiles, and for it the tensor cores
        each = 2 if S <= 32 or processors // tiles * tiles < _FEWEST * processors else 1
        each = {16: each, 8: 2 if many else each + 1, 4: 3 if S <= 16 else 1 if many else 2}[bits]
        parts = max(1, min(each * processors // tiles, steps // fewest))
    programs = tiles * parts
    entry = rows * SPAN_BYTES + padded(S) * depth * 2
    at_a_time = 1 if bits == 4 and many else -(-programs // processors)  # all, but where there is no room for them
    room = _ROOM // at_a_time - (scales_bytes(steps, parts, rows) if bits == 4 else 0)
    entries = min(_MAX_ENTRIES, room // entry, steps // parts)
    if entries < fewest or not _FEWEST * processors <= programs <= most * processors:
        return None
    return RowsTile(rows, parts, entries)


def padded(S: int) -> int:
    """Rows that are computed for S."""
    return max(16, 1 << (S - 1).bit_length())


def scales_bytes(steps: int, parts: int, rows: int) -> int:
    """Of `rows_widened.group_scales`."""
    groups = 2 * -(-steps // parts)
    return 4 * rows * (-(-groups // 16) * 16 if groups > 8 else 1 << (groups - 1).bit_length())


def warps(tile: RowsTile) -> int:
    """Of a program: four, which multiply together, for each 64 rows of the weight."""
    return tile.rows // 16

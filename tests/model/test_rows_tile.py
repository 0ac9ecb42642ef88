"""How products of tens of rows are cut: what every cut must be, whatever the shape."""

from __future__ import annotations

import pytest

from tpserve.model.kernels.rows_tile import SPAN_BYTES, choose_rows_tile, padded, scales_bytes, warps

SHAPES = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (2560, 8192), (5120, 13824), (6144, 4096),
          (28672, 4096), (10240, 8192), (57344, 8192), (8192, 28672), (4096, 5504), (1376, 512)]  # fmt: skip
SHARED_BYTES = 227 << 10


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("S", [1, 9, 16, 17, 32, 33, 64, 65, 96, 112, 128])
def test_every_cut_covers_the_product_and_fits_a_processor(S: int, bits: int) -> None:
    chosen = 0
    for N, K in SHAPES:
        for in_parts, with_end in ((False, False), (True, False), (False, True)):
            tile = choose_rows_tile(S, N, K, 132, bits=bits, in_parts=in_parts, with_end=with_end)
            if tile is None:
                continue
            chosen += 1
            depth = 8 * SPAN_BYTES // bits
            steps = -(-K // depth)
            assert N % tile.rows == 0
            assert tile.parts == 1 or in_parts
            assert tile.entries <= steps // tile.parts  # the first ones are asked for without looking
            ring = tile.entries * (tile.rows * SPAN_BYTES + padded(S) * depth * 2)
            assert ring + (scales_bytes(steps, tile.parts, tile.rows) if bits == 4 else 0) <= SHARED_BYTES
            assert warps(tile) in (4, 8)
            assert 0.7 * 132 <= N // tile.rows * tile.parts <= 3 * 132
    assert chosen or (bits == 16 and 64 < S < 112)


def test_what_is_left_to_others() -> None:
    assert choose_rows_tile(129, 12288, 4096, 132, bits=4) is None
    assert choose_rows_tile(0, 12288, 4096, 132) is None
    assert choose_rows_tile(65, 12288, 4096, 132) is None
    assert choose_rows_tile(16, 12288, 4100, 132) is None  # rows that the copy engine cannot begin at
    assert choose_rows_tile(128, 12288, 4096, 132, bits=8) is not None
    assert choose_rows_tile(128, 12288, 4096, 132, bits=8, torchs=True) is None
    assert choose_rows_tile(128, 4096, 4096, 132, bits=8, torchs=True, in_parts=True) is not None

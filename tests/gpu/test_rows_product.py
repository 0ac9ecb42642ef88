"""Products of some tens of rows against float64: every tile, rows that fill none, sums in parts."""

from __future__ import annotations

import pytest
import torch

from tpserve.model.kernels import has_gluon, is_hopper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and has_gluon() and is_hopper(torch.device("cuda", 0))),
        reason="these kernels are Hopper's, in a Gluon that is known",
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("S", [9, 16, 40, 64, 96, 128])
@pytest.mark.parametrize(
    ("rows", "parts", "entries"), [(64, 1, 3), (64, 3, 8), (128, 1, 4), (128, 4, 7), (256, 2, 3), (256, 5, 4)]
)
def test_products(S: int, rows: int, parts: int, entries: int, dtype: torch.dtype) -> None:
    from tpserve.model.kernels.rows_product import RowsTile, rows_product

    N, K = 512, 64 * 41  # parts of different lengths
    x, w = torch.randn(S, K, device="cuda").to(dtype), torch.randn(N, K, device="cuda").to(dtype)
    tile = RowsTile(rows, parts, entries)
    # Rows behind x's are not zero, and what is behind the output must stay as it was.
    memory = torch.full((S + 7, K), float("nan"), device="cuda", dtype=dtype)
    memory[:S] = x
    out = torch.full((parts * S + 1, N), 7.0, device="cuda", dtype=torch.float32 if parts > 1 else dtype)
    rows_product(memory[:S], w, out[:-1].view(parts, S, N) if parts > 1 else out[:-1], tile)
    expected = x.double() @ w.double().T
    result = out[:-1].view(parts, S, N).double().sum(0)
    assert ((result - expected).norm() / expected.norm()).item() < (1e-5 if parts > 1 else 4e-3)
    assert (out[-1] == 7).all()


@pytest.mark.parametrize("S", [9, 16, 33, 64])
def test_chosen_tiles_fit(S: int) -> None:
    from tpserve.model.kernels.rows_product import choose_rows_tile, rows_product

    processors = torch.cuda.get_device_properties().multi_processor_count
    for N, K in ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (2560, 8192)):
        for in_parts in (False, True):
            tile = choose_rows_tile(S, N, K, processors, in_parts=in_parts)
            if tile is None:
                continue
            assert tile.parts == 1 or in_parts
            x, w = (torch.randn(n, K, device="cuda", dtype=torch.bfloat16) for n in (S, N))
            shape = (tile.parts, S, N) if tile.parts > 1 else (S, N)
            out = torch.empty(shape, device="cuda", dtype=torch.float32 if tile.parts > 1 else torch.bfloat16)
            rows_product(x, w, out, tile)
            expected = x.float() @ w.float().T
            result = out.float().sum(0) if tile.parts > 1 else out.float()
            assert ((result - expected).norm() / expected.norm()).item() < 4e-3

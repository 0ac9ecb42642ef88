"""Tiles of a decode step's products, by what a kernel of Hopper can have: shared memory, and rows without a rest."""

from __future__ import annotations

import pytest
import torch

from tpserve.model.kernels.tiles import Stream, Tile, Tiles, choose_tiles
from tpserve.model.matrix import ROW_SCALES, Matrix

# dim, query heads, key/value heads, feed-forward width; heads of 128.
MODELS = {
    "7B": (4096, 32, 32, 11008),
    "8B": (4096, 32, 8, 14336),
    "13B": (5120, 40, 40, 13824),
    "30B": (6656, 52, 52, 17920),
    "34B": (8192, 64, 8, 22016),
    "70B": (8192, 64, 8, 28672),
}
HEAD_DIM = 128
SHARED = 227 << 10  # bytes that a program may have, by CUDA's table of compute capabilities


def weights(model: str, tp: int, scheme: str) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    """A rank's QKV, wo, gate and up, and down, without memory."""
    dim, heads, kv, ffn = MODELS[model]

    def matrix(n: int, k: int) -> Matrix:
        if scheme == "int4":
            scales = torch.empty(k // 128, n, 2, device="meta")
            return Matrix(torch.empty(n, k // 2, dtype=torch.uint8, device="meta"), scales, 128)
        dtype = {"": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[scheme]
        q = torch.empty(n, k, dtype=dtype, device="meta")
        return Matrix(q, torch.empty(n, device="meta"), ROW_SCALES) if scheme else Matrix(q)

    qkv = (heads + 2 * kv) // tp * HEAD_DIM
    return (
        matrix(qkv, dim), matrix(dim, heads // tp * HEAD_DIM), matrix(2 * ffn // tp, dim), matrix(dim, ffn // tp)
    )  # fmt: skip


def tiles(model: str, tp: int, scheme: str, s: int) -> Tiles:
    each = weights(model, tp, scheme)
    return choose_tiles(s, MODELS[model][0], HEAD_DIM, sum(w.nbytes for w in each), each)


@pytest.mark.parametrize("s", [1, 8])
@pytest.mark.parametrize("scheme", ["", "int8", "fp8", "int4"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_tiles_fit(model: str, tp: int, scheme: str, s: int) -> None:
    each = weights(model, tp, scheme)
    chosen = tiles(model, tp, scheme, s)
    for name, w in zip(("qkv", "wo", "gate_up", "down"), each, strict=True):
        tile = getattr(chosen, name)
        if isinstance(tile, Stream):
            continue  # its ring is cut to what there is
        item = 0.5 if scheme == "int4" else w.q.element_size()
        # All stages but the one that is multiplied are in shared memory, with as much of the rows of x.
        ring = (tile.stages - 1) * tile.depth * (tile.rows * item + 2 * (1 if s == 1 else 8))
        assert ring <= SHARED, (name, tile)
        rows = HEAD_DIM if name == "qkv" else w.shape[0]
        if name != "gate_up":  # which leaves out what is not there
            assert rows % tile.rows == 0, (name, tile)
        assert tile.rows >= 16 or s == 1, "tensor cores take 16 rows of a weight"


def test_each_model_on_one_gpu_has_its_own() -> None:
    """What decides is how many programs fit at a time: 13B's wo as 7B's would be 160 for 132 processors."""
    seven, eight, thirteen = (tiles(model, 1, "", 8) for model in ("7B", "8B", "13B"))
    assert isinstance(seven.wo, Tile)
    assert isinstance(thirteen.wo, Tile)
    assert 4096 // seven.wo.rows <= 132 < 5120 // seven.wo.rows
    assert 5120 // thirteen.wo.rows <= 132
    assert eight.gate_up == thirteen.gate_up != seven.gate_up
    assert seven.qkv == eight.qkv != thirteen.qkv
    assert tiles("30B", 1, "", 8) == thirteen
    assert tiles("34B", 1, "", 8) == tiles("70B", 1, "", 8) != thirteen

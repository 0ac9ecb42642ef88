"""Products of tens of rows against float64: all tiles, rows that fill none, sums in parts, ends; and who uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.gpu.network_driver import SHAPES, Driver, llama
from tpserve.model.kernels import has_gluon, is_hopper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and has_gluon() and is_hopper(torch.device("cuda", 0))),
        reason="these kernels are Hopper's, in a Gluon that is known",
    ),
]


def weight(rows: int, columns: int, kind: str) -> tuple[Any, torch.dtype, torch.Tensor]:
    """As the kernels read it; the type of rows that it multiplies; and what it stands for, float64."""
    from tpserve.model.matrix import ROW_SCALES, Matrix

    w = torch.randn(rows, columns, device="cuda") / 50
    if kind in ("bfloat16", "float16"):
        dtype: torch.dtype = getattr(torch, kind)
        return Matrix(w.to(dtype)), dtype, w.to(dtype).double()
    if kind == "int4":
        groups, half = columns // 128, 64
        q = torch.randint(16, (rows, groups, 2, half), device="cuda").to(torch.uint8)
        scale = ((torch.rand(groups, rows, device="cuda") + 0.5) / 100).bfloat16().float()  # as its format has them
        eight = (torch.randn(groups, rows, device="cuda") * scale * 4).bfloat16().float()
        zero = eight - 136 * scale  # of 128 + q
        exact = (q.flatten(2).double() + 128) * scale.T.double()[..., None] + zero.T.double()[..., None]
        packed = (q[:, :, 0] | q[:, :, 1] << 4).flatten(1)
        return Matrix(packed, torch.stack([scale, zero], -1), 128), torch.bfloat16, exact.flatten(1)
    scale = torch.rand(rows, device="cuda") + 0.5
    q = torch.randint(-128, 128, w.shape, device="cuda").to(torch.int8) if kind == "int8" else w.to(torch.float8_e4m3fn)
    return Matrix(q, scale, ROW_SCALES), torch.bfloat16, q.double() * scale.double()[:, None]


def room(kind: str, S: int, rows: int, entries: int, inputs: int) -> bool:
    """Whether a ring, and int4's scales, fit a processor's memory: rows of x are as deep as the weight's."""
    padded, depth = max(16, 1 << (S - 1).bit_length()), {"int8": 256, "fp8": 256, "int4": 512}.get(kind, 128)
    scales = 4 * rows * -(-inputs // 2048) * 16 if kind == "int4" else 0
    return entries * (rows * 128 + padded * depth) + scales <= 225 << 10


KINDS = ["bfloat16", "float16", "int8", "fp8", "int4"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("S", [9, 40, 64, 96, 128])
@pytest.mark.parametrize(
    ("rows", "parts", "entries"), [(64, 1, 3), (64, 3, 8), (128, 1, 4), (128, 4, 7), (256, 2, 3), (256, 5, 4)]
)
def test_products(S: int, rows: int, parts: int, entries: int, kind: str) -> None:
    from tpserve.model.kernels.rows_product import rows_product
    from tpserve.model.kernels.rows_tile import RowsTile

    N, K = 512, 128 * 121 if kind == "int4" else 64 * 81  # parts of different lengths
    if not room(kind, S, rows, entries, K // parts):
        pytest.skip("the ring would be larger than a processor's memory")
    w, dtype, exact = weight(N, K, kind)
    x = torch.randn(S, K, device="cuda").to(dtype)
    tile = RowsTile(rows, parts, entries)
    # Rows behind x's are not zero, and what is behind the output must stay as it was.
    memory = torch.full((S + 7, K), float("nan"), device="cuda", dtype=dtype)
    memory[:S] = x
    out = torch.full((parts * S + 1, N), 7.0, device="cuda", dtype=torch.float32 if parts > 1 else dtype)
    rows_product(memory[:S], w, out[:-1].view(parts, S, N) if parts > 1 else out[:-1], tile)
    expected = x.double() @ exact.T
    result = out[:-1].view(parts, S, N).double().sum(0)
    exact_products = parts > 1 and kind != "int4"  # whose weights are rounded
    assert ((result - expected).norm() / expected.norm()).item() < (1e-5 if exact_products else 4e-3)
    assert (out[-1] == 7).all()


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("S", [9, 16, 33, 64, 128])
def test_chosen_tiles_fit(S: int, kind: str) -> None:
    from tpserve.model.kernels.rows_product import rows_product
    from tpserve.model.kernels.rows_tile import choose_rows_tile

    processors = torch.cuda.get_device_properties().multi_processor_count
    chosen = 0
    for N, K in ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (2560, 8192), (5120, 5120)):
        for in_parts, with_end in ((False, False), (True, False), (False, True)):
            bits = {"bfloat16": 16, "int4": 4}.get(kind, 8)
            tile = choose_rows_tile(
                S, N, K, processors, bits=bits, in_parts=in_parts, with_end=with_end, torchs=kind == "fp8"
            )  # fmt: skip
            if tile is None:
                continue
            chosen += 1
            assert tile.parts == 1 or in_parts
            w, dtype, exact = weight(N, K, kind)
            x = torch.randn(S, K, device="cuda").to(dtype)
            shape = (tile.parts, S, N) if tile.parts > 1 else (S, N)
            out = torch.empty(shape, device="cuda", dtype=torch.float32 if tile.parts > 1 else torch.bfloat16)
            rows_product(x, w, out, tile)
            expected = x.float() @ exact.float().T
            result = out.float().sum(0) if tile.parts > 1 else out.float()
            assert ((result - expected).norm() / expected.norm()).item() < 4e-3
    assert chosen >= (4 if S > 64 and kind in ("bfloat16", "fp8") else 8)


def normed(S: int, D: int, dtype: torch.dtype) -> tuple[Any, torch.Tensor, int]:
    """Rows that lack their norm, in buffers with more rows than S; the rows divided by it, float64; parts of sums."""
    from tpserve.model.kernels.norm import Normed

    width = min(D & -D, 512)
    residual = torch.randn(S + 3, D, device="cuda") * (1 + torch.arange(S + 3, device="cuda")[:, None])
    sums = residual.square().view(S + 3, D // width, width).sum(2).flatten()
    x = residual.to(dtype)
    divided = x.double() * (residual.double().square().mean(1, keepdim=True) + 1e-5).rsqrt()
    return Normed(residual, x, sums, 1e-5), divided[:S], D // width


WAYS = [("bfloat16", False), ("bfloat16", True), ("float16", True), ("int8", True), ("fp8", True), ("int4", True)]
PAIRS = [(64, 3), (128, 4), (256, 3)]


@pytest.mark.parametrize(("kind", "pdl"), WAYS)
@pytest.mark.parametrize("S", [9, 40, 64, 128])
@pytest.mark.parametrize(("rows", "entries"), PAIRS)
@pytest.mark.parametrize("F", [512, 344])
def test_gate_and_up(F: int, rows: int, entries: int, S: int, kind: str, pdl: bool) -> None:
    from tpserve.model.kernels.rows_pairs import gate_up
    from tpserve.model.kernels.rows_tile import RowsTile

    D = 128 * 21 if kind == "int4" else 64 * 41
    if not room(kind, S, rows, entries, D):
        pytest.skip("the ring would be larger than a processor's memory")
    w, dtype, weights = weight(2 * F, D, kind)
    x, divided, parts = normed(S, D, dtype)
    out = torch.full((S + 1, F), 7.0, device="cuda", dtype=dtype)
    lacks_nothing = divided.to(dtype)
    for rows_SK, norm, of_parts, exact in (
        (x.x_SD[:S], x, parts, divided),
        (lacks_nothing, None, 0, lacks_nothing.double()),
    ):
        gate_up(rows_SK, w, out[:S], norm, of_parts, RowsTile(rows, 1, entries), pdl=pdl)
        gate, up = (exact @ weights.T).split(F, 1)
        expected = gate / (1 + (-gate).exp()) * up
        assert ((out[:S].double() - expected).norm() / expected.norm()).item() < 4e-3
        assert (out[S] == 7).all()


@pytest.mark.parametrize(("kind", "pdl"), WAYS)
@pytest.mark.parametrize("S", [9, 40, 64, 128])
@pytest.mark.parametrize(("rows", "entries"), PAIRS)
@pytest.mark.parametrize(("H", "K", "E"), [(4, 4, 128), (8, 4, 64), (6, 2, 128)])
def test_queries_keys_and_values(H: int, K: int, E: int, rows: int, entries: int, S: int, kind: str, pdl: bool) -> None:
    from tpserve.model.kernels.rows_pairs import fits_qkv, qkv
    from tpserve.model.kernels.rows_tile import RowsTile

    D, slots, longest = 64 * 40, 200, 96
    if not room(kind, S, rows, entries, D):
        pytest.skip("the ring would be larger than a processor's memory")
    w, dtype, weights = weight((H + 2 * K) * E, D, kind)
    x, divided, parts = normed(S, D, dtype)
    q = torch.full((S + 1, H, E), 7.0, device="cuda", dtype=dtype)
    keys, values = (torch.full((slots, K, E), 7.0, device="cuda", dtype=dtype) for _ in range(2))
    rope = torch.randn(longest, E // 2, 2, device="cuda")
    positions = torch.randint(longest, (S + 2,), device="cuda")
    slot = torch.randperm(slots, device="cuda")[: S + 2]
    positions[3], slot[3] = -1, -1  # padding
    tile = RowsTile(rows, 1, entries)
    assert fits_qkv(tile, q, keys)
    qkv(x.x_SD[:S], w, q[:S], keys, values, rope, positions, slot, x, parts, tile, pdl=pdl)

    expected = (divided @ weights.T).view(S, H + 2 * K, E)
    turned = torch.view_as_complex(expected.unflatten(2, (-1, 2)).contiguous())
    turned = turned * torch.view_as_complex(rope.double()[positions[:S]])[:, None]
    turned = torch.view_as_real(turned).flatten(2)
    there = positions[:S] >= 0
    for result, wanted in (
        (q[:S][there], turned[there, :H]),
        (keys[slot[:S][there]], turned[there, H : H + K]),
        (values[slot[:S][there]], expected[there, H + K :]),
    ):
        assert ((result.double() - wanted).norm() / wanted.norm()).item() < 4e-3
    assert (q[S] == 7).all()
    for cache in (keys, values):
        written = (cache != 7).flatten(1).any(1).nonzero().flatten()
        assert written.tolist() == sorted(slot[:S][there].tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_tens_of_rows_are_ours_at_a_real_width(dtype: torch.dtype) -> None:
    """Of the network; also in a step that asks for nothing."""
    from tpserve.model.kernels import rows_pairs, rows_product

    driver = Driver(llama(*SHAPES[-1]), dtype, True, graphs=False)
    launched: list[str] = []

    def noting(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def launch(*args: Any, **named: Any) -> None:
            launched.append(name)
            function(*args, **named)

        return launch

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((rows_pairs, "qkv"), (rows_pairs, "gate_up"), (rows_product, "rows_product")):
            patch.setattr(module, name, noting(name, getattr(module, name)))
        for parts, asked in (
            ([(row, 5, 1) for row in range(30)], True),
            ([(row, 0, 2) for row in range(20)], True),
            ([(row, 0, 2) for row in range(20)], False),
        ):
            launched.clear()
            driver.step(parts, asked)
            assert [launched.count(name) for name in ("qkv", "gate_up", "rows_product")] == [3, 3, 6]

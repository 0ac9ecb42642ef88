"""Weights with fewer bits and a float8 cache in the fused network, beside what they stand for and the plain one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.gpu.network_driver import BLOCK, BLOCKS, MAX_LEN, ROWS, Driver, llama
from tests.gpu.test_network import STEPS
from tpserve.model.fused_network import FusedNetwork
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama, TransformerBlock
from tpserve.model.network import PlainNetwork
from tpserve.model.parallel import TensorParallel
from tpserve.model.quantized import Float8Linear, Int4Linear, Int8Linear, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]
LAYERS = {
    "int8": Int8Linear,
    "fp8": Float8Linear,
    "int4": lambda weight: Int4Linear(weight, 128),
    "int4 by 32": lambda weight: Int4Linear(weight, 32),
}


@pytest.mark.parametrize("scheme", list(LAYERS))
@pytest.mark.parametrize(("n", "k"), [(192, 512), (528, 384), (9000, 1024)])
@pytest.mark.parametrize("t", [1, 3, 16, 20, 100, 128, 300])
def test_products(scheme: str, n: int, k: int, t: int) -> None:
    from tpserve.model.kernels.mixed import matmul
    from tpserve.model.matrix import join

    layer: Any = LAYERS[scheme](torch.randn(n, k, device="cuda") * k**-0.5)
    x = torch.randn(t, k, device="cuda").bfloat16()
    exact = x.double() @ layer.dequantized().double().t()
    got = matmul(x, join(layer))
    # Activations in float8 have three bits of mantissa.
    assert (got - exact).norm() / exact.norm() < (4e-2 if scheme == "fp8" else 5e-3)


@pytest.mark.parametrize("scheme", list(LAYERS))
@pytest.mark.parametrize("k", [384, 4096, 11008])
@pytest.mark.parametrize("s", [1, 5, 8])
def test_products_of_a_decode_step(scheme: str, k: int, s: int) -> None:
    """Of shapes that take several rounds of a program, and of one that takes less than a round."""
    from tpserve.model.kernels import linear
    from tpserve.model.kernels.norm import Normed
    from tpserve.model.kernels.tiles import choose_tiles
    from tpserve.model.matrix import join

    n = 256
    layer: Any = LAYERS[scheme]((torch.randn(n, k, device="cuda") * k**-0.5).bfloat16())
    x = torch.randn(8, k, device="cuda").bfloat16()
    weight = join(layer)
    # Of an int4 step, QKV's groups may be larger than those of a rank's slice of wo.
    tiles = choose_tiles(s, n, 64, weight.nbytes, (weight,) * 4)
    for tile in (tiles.wo, tiles.down):
        into = Normed(
            torch.zeros(8, n, device="cuda"), x.new_zeros(8, n), torch.zeros(8 * n, device="cuda"), 1e-5
        )  # fmt: skip
        linear.add_product(x, weight, into, torch.ones(n, device="cuda"), s, tile, pdl=True)
        exact = x[:s].double() @ layer.dequantized().double().t()
        assert (into.residual_SD[:s] - exact).norm() / exact.norm() < 1e-4
        assert not into.residual_SD[s:].any()


def test_joined_layers_share_memory_and_go_on_working() -> None:
    from tpserve.model.matrix import join

    for scheme, make in LAYERS.items():
        layers: list[Any] = [make(torch.randn(64, 256, device="cuda") / 16) for _ in range(3)]
        before = [layer.dequantized() for layer in layers]
        joined = join(*layers)
        assert joined.shape == (192, 256), scheme
        assert all(torch.equal(layer.dequantized(), was) for layer, was in zip(layers, before, strict=True))
        assert len({layer.q_NK.untyped_storage().data_ptr() for layer in layers}) == 1


class Quantised(Driver):
    """As `Driver`, with fewer bits."""

    def __init__(self, model: Llama, scheme: str | None, kv_dtype: torch.dtype, fused: bool) -> None:
        super().__init__(model, torch.bfloat16, False)
        plain = copy.deepcopy(model).bfloat16()
        plain.rope_PC2 = plain.rope_PC2.float()
        if scheme is not None:
            quantize(plain, scheme)
        args = model.args
        cache = PagedKVCache(
            args.n_layers, BLOCKS, BLOCK, args.n_kv_heads, args.head_dim, dtype=kv_dtype, device=torch.device("cuda")
        )
        order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1))[: ROWS * MAX_LEN // BLOCK]
        tables = order.view(ROWS, -1).cuda()
        self.network = (
            FusedNetwork(plain, cache, self.tokens, tables, TensorParallel(), max_num_seqs=ROWS, graphs=True)
            if fused
            else PlainNetwork(plain, cache, self.tokens, tables)
        )
        self.network.warm_up()


def widened(model: Llama, scheme: str) -> Llama:
    """A model whose float32 weights are what the quantised ones stand for."""
    exact = copy.deepcopy(model)
    quantize(exact, scheme)
    for block in exact.layers:
        assert isinstance(block, TransformerBlock)
        for part in (block.attention, block.feed_forward):
            for name, layer in list(part.named_children()):
                assert isinstance(layer, (Int8Linear, Float8Linear, Int4Linear))
                weight = layer.dequantized()
                plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                plain.weight = nn.Parameter(weight, requires_grad=False)
                setattr(part, name, plain)
    return exact


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_fused_is_as_near_to_what_weights_stand_for_as_plain(scheme: str) -> None:
    model = llama(1024, 8, 2)
    exact = Driver(widened(model, scheme), torch.float32, False)
    plain, fused = (Quantised(model, scheme, torch.bfloat16, fused) for fused in (False, True))
    for i, parts in enumerate(STEPS):
        reference = exact.step(parts)
        plain_error, fused_error = (
            ((driver.step(parts) - reference).norm() / reference.norm()).item() for driver in (plain, fused)
        )
        assert fused_error < 1.3 * plain_error + 5e-3, (i, fused_error, plain_error)
        assert plain_error < 0.1, "the yardstick is bent"


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_float8_cache(heads: tuple[int, int]) -> None:
    model = llama(1024, *heads)
    exact = Driver(model, torch.float32, False)
    plain, fused = (Quantised(model, None, torch.float8_e4m3fn, fused) for fused in (False, True))
    for i, parts in enumerate(STEPS):
        reference = exact.step(parts)
        plain_error, fused_error = (
            ((driver.step(parts) - reference).norm() / reference.norm()).item() for driver in (plain, fused)
        )
        assert fused_error < 1.2 * plain_error + 2e-3, (i, fused_error, plain_error)
        assert plain_error < 0.1, "the yardstick is bent"

"""Fewer bits: what a layer computes is what its numbers say, and how far those are from the weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.data import shared_data
from tests.helpers.stories import converted, tokenizer
from tpserve.model.attention import PagedAttention, SequenceSlice
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.loader import LoadedModel, load_model
from tpserve.model.quantized import (
    SCHEMES,
    Float8Linear,
    Int4Linear,
    Int8Linear,
    _from_float8,
    from_halves,
    in_halves,
    is_quantized,
    quantize,
    weight_bytes,
)


def layers(n: int, k: int) -> dict[str, tuple[torch.Tensor, Int8Linear | Int4Linear | Float8Linear]]:
    torch.manual_seed(n + k)
    weight = torch.randn(n, k) * torch.rand(n, 1)
    weight[3] = 0
    return {
        "int8": (weight, Int8Linear(weight)),
        "int4": (weight, Int4Linear(weight, 32)),
        "fp8": (weight, Float8Linear(weight)),
    }


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("n", "k"), [(32, 64), (64, 160), (24, 96), (7, 32)])  # torch's products take the first only
def test_a_layer_computes_with_the_numbers_it_keeps(scheme: str, n: int, k: int) -> None:
    weight, layer = layers(n, k)[scheme]
    kept = layer.dequantized()
    assert kept.shape == weight.shape
    assert not kept[3].any()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        for tokens in (1, 5, 33):
            x = torch.randn(tokens, k).to(dtype)
            y, expected = layer(x), x.float() @ kept.t()
            assert y.dtype == dtype
            limit = 0.08 if scheme == "fp8" and dtype == torch.bfloat16 else tolerance  # activations are float8, too
            assert (y.float() - expected).norm() <= limit * expected.norm()


def test_how_far_the_numbers_are_from_the_weight() -> None:
    made = layers(48, 256)
    weight = made["int8"][0]
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((made["int8"][1].dequantized() - weight).abs() <= step * 0.501).all()
    grouped = weight.view(48, -1, 32)
    step = (grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)) / 15
    assert ((made["int4"][1].dequantized().view_as(grouped) - grouped).abs() <= step * 0.51 + 1e-6).all()
    error = (made["fp8"][1].dequantized() - weight).abs()  # three bits of mantissa, and a smallest number
    assert (error <= weight.abs() / 15 + weight.abs().amax(1, keepdim=True) / 448 * 2**-9).all()


def test_int4s_numbers_are_bfloat16s() -> None:
    """Its step, and what 8 stands for: a product in bfloat16 has the weights that one in float32 has, rounded once."""
    torch.manual_seed(2)
    weight = torch.randn(40, 256) * torch.rand(40, 1) + torch.randn(40, 1)
    weight[3], weight[4], weight[5, :128] = 0.0, -0.0123, 77.7
    weight[3:6] = weight[3:6].bfloat16().float()
    layer = Int4Linear(weight, 128)
    step_GN, zero_GN = layer.scale_GN2.unbind(-1)
    eight_GN = zero_GN + 8 * step_GN
    assert torch.equal(step_GN.bfloat16().float(), step_GN)
    torch.testing.assert_close(eight_GN.bfloat16().float(), eight_GN, rtol=1e-6, atol=1e-6)
    kept = layer.dequantized()
    for equal in ((3, slice(None)), (4, slice(None)), (5, slice(128))):
        assert torch.equal(kept[equal], weight[equal])


def test_int4_keeps_numbers_that_are_far_from_zero_but_near_each_other() -> None:
    """bfloat16 has no number between two neighbours: the step is as large as the eight's rounding needs."""
    two = torch.where(torch.rand(8, 64) < 0.5, 1.0, 1.0078125)
    near = 1 + 0.003 * torch.randn(8, 64)
    for weight in (two, near):
        layer = Int4Linear(weight, 32)
        step_GN, zero_GN = layer.scale_GN2.unbind(-1)
        assert torch.equal((zero_GN + 8 * step_GN).bfloat16().float(), zero_GN + 8 * step_GN)
        error = (layer.dequantized() - weight).abs().view(8, 2, 32)
        # Half a step; and that of bfloat16's eight bits, the nearest may be 2^-9 less, for 8.5 of them.
        assert (error <= 0.52 * step_GN.T[:, :, None]).all()


def test_every_number_of_float8_is_widened_exactly() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = every[every.float().isfinite()].view(2, 127)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(_from_float8(numbers, dtype), numbers.to(dtype))


@pytest.mark.parametrize("group", [32, 128])
def test_int4_as_gpus_have_it_is_the_same_weight(group: int) -> None:
    torch.manual_seed(group)
    layer = Int4Linear(torch.randn(40, 3 * group), group)
    step_GN, zero_GN = layer.scale_GN2.unbind(-1)
    scale_GN2 = torch.stack([step_GN, zero_GN - 128 * step_GN], -1)
    got = from_halves(in_halves(layer.q_NK, group), scale_GN2, group, torch.float32)
    torch.testing.assert_close(got, layer.dequantized(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("rows", [48, 4096 + 48])
def test_int4_is_packed_for_bfloat16_a_few_rows_at_a_time(rows: int) -> None:
    weight = torch.randn(rows, 128).bfloat16()
    packed, plain = Int4Linear(weight, 64), Int4Linear(weight.float(), 64)
    assert packed.packed
    assert not plain.packed
    x = torch.randn(3, 128).bfloat16()
    expected = x.float() @ plain.dequantized().t()
    assert (packed(x).float() - expected).norm() < 0.01 * expected.norm()


def nll(loaded: LoadedModel, kv_dtype: torch.dtype) -> float:
    """Mean negative log-likelihood of the sample stories, in nats a token."""
    args, total, count = loaded.info.args, 0.0, 0
    text = shared_data("text") / "tinystories_sample_5stories.txt"
    for story in text.read_text().split("<|endoftext|>"):
        tokens = torch.tensor(tokenizer().encode(story.strip(), bos=True, eos=False)[:512])
        if len(tokens) < 2:
            continue
        n = len(tokens) - 1
        cache = PagedKVCache(
            args.n_layers, -(-n // 16), 16, args.n_kv_heads, args.head_dim, dtype=kv_dtype, device=loaded.device
        )
        positions, table = torch.arange(n), torch.arange(-(-n // 16))[None]
        attend = PagedAttention(cache, table, torch.zeros_like(positions), positions, [], [SequenceSlice(0, n)])
        with torch.inference_mode():
            logits = loaded.model(tokens[:-1], positions, attend)
        total += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").item()
        count += n
    return total / count


def test_a_real_model_keeps_its_quality(tmp_path: Path) -> None:
    folder = converted(tmp_path)
    exact = load_model(folder, dtype=torch.float32)
    whole_bytes = weight_bytes(exact.model)
    reference = nll(exact, torch.float32)
    assert reference == pytest.approx(1.266, abs=5e-4)
    assert nll(exact, torch.float8_e4m3fn) == pytest.approx(reference, abs=0.06)
    # 260,000 parameters forgive less than seven billion do.
    for scheme, limit, share in (("int8", 0.004, 0.45), ("int4", 0.12, 0.55), ("fp8", 0.03, 0.45)):
        loaded = load_model(folder, dtype=torch.float32)
        quantize(loaded.model, scheme)
        assert is_quantized(loaded.model)
        assert weight_bytes(loaded.model) < share * whole_bytes
        loss = nll(loaded, torch.float32) - reference
        assert abs(loss) < limit, f"{scheme}: {loss:+.4f} nats a token"

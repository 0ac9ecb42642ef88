"""Rotary embedding against complex multiplication, and the scaled frequencies against their definition by cases."""

from __future__ import annotations

import dataclasses
import math

import torch

from tpserve.model.args import ModelArgs
from tpserve.model.rope import apply_rope, rope_table

ARGS = ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=4, vocab_size=8, ffn_hidden_dim=8, rope_theta=500.0)


def test_rotation_is_multiplication_by_a_unit_complex_number() -> None:
    x = torch.randn(5, 4, 16)
    positions = torch.tensor([0, 1, 2, 100, 511])
    out = apply_rope(x, rope_table(ARGS, 512, "cpu")[positions])
    freqs = ARGS.rope_theta ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    turn = torch.polar(torch.ones(5, 8, dtype=torch.float64), positions[:, None] * freqs)
    expected = torch.view_as_real(torch.view_as_complex(x.double().view(5, 4, 8, 2)) * turn[:, None]).flatten(-2)
    torch.testing.assert_close(out.double(), expected, atol=2e-4, rtol=0)  # float32 angles up to 511
    assert torch.equal(out[0], x[0])


def test_half_precision_is_rotated_in_float32() -> None:
    x = torch.randn(3, 4, 16, dtype=torch.bfloat16)
    table = rope_table(ARGS, 8, "cpu")[torch.tensor([1, 3, 7])]
    assert torch.equal(apply_rope(x, table), apply_rope(x.float(), table).bfloat16())


def test_scaled_frequencies() -> None:
    args = dataclasses.replace(ARGS, dim=512, rope_theta=500000.0, use_scaled_rope=True)
    plain = dataclasses.replace(args, use_scaled_rope=False)
    angle = torch.atan2(*rope_table(args, 2, "cpu")[1].unbind(-1)[::-1]).double()
    freqs = torch.atan2(*rope_table(plain, 2, "cpu")[1].unbind(-1)[::-1]).double()
    for got, freq in zip(angle.tolist(), freqs.tolist(), strict=True):
        wavelength = 2 * math.pi / freq
        if wavelength < 8192 / 4:
            want = freq
        elif wavelength > 8192 / 1:
            want = freq / 8
        else:
            share = (8192 / wavelength - 1) / (4 - 1)
            want = (1 - share) * freq / 8 + share * freq
        assert abs(got - want) <= 1e-5 * want
    assert (angle < freqs).any()
    assert torch.isclose(angle, freqs).any()

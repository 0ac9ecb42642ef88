"""float32 layers that oneDNN computes are what they were, and only those that gain are its."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tpserve.model import onednn
from tpserve.model.onednn import OneDnnLinear, use_onednn


@pytest.fixture(autouse=True)
def forget() -> None:
    onednn._is_faster.cache_clear()


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 128])
def test_the_same_product(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(onednn, "_is_faster", lambda: True)
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(96, 40, bias=False), nn.Linear(40, 24, bias=False)])
    at = [layer.weight.data_ptr() for layer in layers]
    x_TK = torch.randn(rows, 96)
    with torch.inference_mode():
        expected = layers[1](layers[0](x_TK))
        use_onednn(layers)
        assert all(type(layer) is OneDnnLinear for layer in layers)
        torch.testing.assert_close(layers[1](layers[0](x_TK)), expected, atol=1e-5, rtol=1e-5)
    assert [layer.weight.data_ptr() for layer in layers] == at, "the weights moved"


def test_only_float32_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_is_faster", lambda: True)
    layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8, bias=False).bfloat16(), nn.Embedding(8, 8)])
    use_onednn(layers)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Linear, nn.Embedding]


@pytest.mark.parametrize(
    ("vendor", "capability", "faster"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
        ("", "AVX512", False),
    ],
)
def test_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str, faster: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\n" + (f"vendor_id\t: {vendor}\n" if vendor else ""))
    monkeypatch.setattr(onednn, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert onednn._is_faster() == faster
    layer = nn.Linear(4, 4, bias=False)
    use_onednn(nn.ModuleList([layer]))
    assert (type(layer) is OneDnnLinear) == faster

"""float32 products on CPUs for which torch's own library does not bring its best code.

torch multiplies float32 matrices with MKL, which runs AVX-512 code on Intel's processors only. oneDNN, which torch
brings too and uses for bfloat16, runs it on any that has it: on a Zen 4 of two cores such a product takes 0.5 to 0.65
of the time with up to 128 rows, 0.75 to 0.9 with 512. Small matrices gain nothing, and pay for the call.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import nn

_CPUINFO = Path("/proc/cpuinfo")


class OneDnnLinear(nn.Linear):
    """A linear layer without bias that oneDNN computes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., K] float32 → [..., N]."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, None, "none", [], "")
        return y


def use_onednn(model: nn.Module) -> None:
    """Lets oneDNN compute a model's float32 layers where it is faster; weights stay where they are."""
    if not _is_faster():
        return
    for layer in model.modules():
        if type(layer) is nn.Linear and [w.dtype for w in layer.parameters()] == [torch.float32]:  # it has no bias
            layer.__class__ = OneDnnLinear


@functools.lru_cache
def _is_faster() -> bool:
    """Whether this is an x86 processor with AVX-512 that is not Intel's. It is not measured: all ranks and all
    starts on one machine must compute alike."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if not _CPUINFO.exists():  # not Linux
        return False
    vendors = [line for line in _CPUINFO.read_text().splitlines() if line.startswith("vendor_id")]
    return bool(vendors) and "GenuineIntel" not in vendors[0]

"""Which rank compiles what first. Triton stands for itself on GPUs only: here a stand-in notes what it is asked for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tpserve.model.parallel import TensorParallel

FILE = Path(__file__).parents[2] / "model" / "kernels" / "precompile.py"


class Kernel:
    """As `triton.runtime.JITFunction`: `run` asks the hook before it compiles, `preload` compiles."""

    def __init__(self, name: str, triton: ModuleType, compiled: list[str]) -> None:
        self.__name__ = name
        self._triton, self._compiled = triton, compiled

    def run(self, variant: str, *, grid: Any, warmup: bool) -> None:
        assert warmup, "it was launched"
        about = {"specialization_data": variant}
        assert self._triton.knobs.runtime.jit_cache_hook(fn=SimpleNamespace(jit_function=self), compile=about)

    def preload(self, variant: str) -> None:
        if self.__name__ == "broken":
            raise RuntimeError("no such instruction")
        self._compiled.append(f"{self.__name__} {variant}")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    triton, found = ModuleType("triton"), []  # type: ignore[var-annotated]
    triton.runtime = SimpleNamespace(JITFunction=Kernel)  # type: ignore[attr-defined]
    triton.knobs = SimpleNamespace(runtime=SimpleNamespace(jit_cache_hook=None))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # one thread: the order is what is asked for
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_compiles_all_and_its_share_first(compiled: list[str], size: int) -> None:
    spec = importlib.util.spec_from_file_location("precompile_here", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    triton = sys.modules["triton"]
    all_ = {f"{name} {variant}" for name in "abcde" for variant in ("x", "y")}
    first: list[str] = []
    for rank in range(size):
        compiled.clear()
        kernels = [Kernel(name, triton, compiled) for name in ("a", "b", "broken", "c", "d", "e")]
        with module.compiled_together(torch.device("cpu"), TensorParallel(rank, size)):
            for _ in range(2):
                for kernel in kernels:
                    for variant in ("x", "y"):
                        kernel.run(variant, grid=(1,), warmup=False)
        assert triton.knobs.runtime.jit_cache_hook is None  # type: ignore[attr-defined]
        assert set(compiled) == all_
        assert len(compiled) == len(all_), "once each"
        first += compiled[: len(all_) // size]
    assert len(set(first)) >= len(all_) - size, "the ranks begin with different kernels"

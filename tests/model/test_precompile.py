"""Who compiles what. Triton stands for itself on GPUs only: here a stand-in notes what it is asked for."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tpserve.model.parallel import TensorParallel

FILE = Path(__file__).parents[2] / "model" / "kernels" / "precompile.py"
NAMES = ("a", "b", "broken", "c", "d", "e")


class Kernel:
    """As `triton.runtime.JITFunction`: `run` asks the hook before it compiles, `preload` compiles, unless it has been
    done by anybody before."""

    def __init__(self, name: str, triton: Any, folder: Path) -> None:
        self.__name__ = name
        self.asked: list[str] = []
        self._triton, self._folder, self._hash = triton, folder, ""

    @property
    def cache_key(self) -> str:
        self._hash = "by what it calls"
        return self._hash

    def is_gluon(self) -> bool:
        return self.__name__ in "de"

    def run(self, variant: str, *, grid: Any, warmup: bool) -> None:
        assert warmup, "it was launched"
        about = {"specialization_data": variant}
        assert self._triton.knobs.runtime.jit_cache_hook(fn=SimpleNamespace(jit_function=self), compile=about)

    def preload(self, variant: str) -> None:
        assert self._triton.runtime.driver.active.get_current_device() == 3
        assert self._hash, "forks would not agree on it"
        self.asked.append(variant)
        if self.__name__ == "broken":
            raise RuntimeError("no such instruction")
        place = self._folder / f"{self.__name__} {variant}"
        hit = place.exists()
        if not hit:
            place.write_text(str(os.getpid()))
            self._triton.compiled.append(place.name)
        if self._triton.knobs.compilation.listener is not None:
            self._triton.knobs.compilation.listener(src=None, metadata={}, cache_hit=hit)


class Driver:
    """CUDA's, which a fork cannot use."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def get_current_device(self) -> int:
        assert os.getpid() == self._pid
        return 3


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Any:
    stand_in: Any = ModuleType("triton")
    stand_in.runtime = SimpleNamespace(JITFunction=Kernel, driver=SimpleNamespace(active=Driver()))
    stand_in.knobs = SimpleNamespace(
        runtime=SimpleNamespace(jit_cache_hook=None), compilation=SimpleNamespace(listener=None)
    )
    stand_in.compiled = []  # by this process
    monkeypatch.setitem(sys.modules, "triton", stand_in)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return stand_in


def start(triton: Any, folder: Path, tp: TensorParallel) -> list[Kernel]:
    """A rank's."""
    spec = importlib.util.spec_from_file_location("precompile_here", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernels = [Kernel(name, triton, folder) for name in NAMES]
    with module.compiled_together(torch.device("cpu"), tp):
        for _ in range(2):
            for kernel in kernels:
                for variant in ("x", "y"):
                    kernel.run(variant, grid=(1,), warmup=False)
    assert triton.knobs.runtime.jit_cache_hook is None
    assert triton.knobs.compilation.listener is None
    for kernel in kernels:
        assert set(kernel.asked) == {"x", "y"}, "all of them, here"
    return kernels


def on_disk(folder: Path) -> dict[str, int]:
    """By kernel and variant, which process has compiled it."""
    return {path.name: int(path.read_text()) for path in folder.iterdir()}


ALL = {f"{name} {variant}" for name in NAMES if name != "broken" for variant in ("x", "y")}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_compiles_all_and_its_share_first(
    triton: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # one thread: the order is what is asked for
    first: list[str] = []
    for rank in range(size):
        folder = tmp_path / str(rank)
        folder.mkdir()
        start(triton, folder, TensorParallel(rank, size))
        assert on_disk(folder).keys() == ALL
        first += triton.compiled[: len(ALL) // size]
        triton.compiled.clear()
    assert len(set(first)) >= len(ALL) - size, "the ranks begin with different kernels"


@pytest.mark.parametrize("size", [1, 2])
def test_forks_compile_what_no_start_before_has(
    triton: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    start(triton, tmp_path, TensorParallel(0, size))
    found = on_disk(tmp_path)
    assert found.keys() == ALL
    # By one it is found that none is there; the others' share is theirs, and only where they are late it is done here.
    others = len(NAMES) * 2 * (size - 1) // size
    assert 1 <= list(found.values()).count(os.getpid()) <= 1 + others
    assert len(set(found.values())) > 1

    def fork() -> int:
        raise AssertionError("everything is there")

    monkeypatch.setattr("os.fork", fork)
    start(triton, tmp_path, TensorParallel())


def test_without_forks_threads_compile(triton: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "no more processes")

    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.fork", fork)
    start(triton, tmp_path, TensorParallel())
    assert on_disk(tmp_path) == dict.fromkeys(ALL, os.getpid())

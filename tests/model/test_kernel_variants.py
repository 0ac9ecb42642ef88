"""Which variants of the kernels a step launches: those of a step of two layers are those of all.

What is compiled at the start is found by steps of two layers (`FusedNetwork.warm_up`). A variant that only a later
layer has would be compiled while somebody waits. Triton and the exchanges between ranks are stand-ins: kernels note
what would make Triton compile, and compute nothing.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # torch imports it by the way, and it asks whether there is a Triton

from tpserve.model.args import ModelArgs
from tpserve.model.decoder import FusedDecoder
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama
from tpserve.model.parallel import TensorParallel, num_kv_heads, shard
from tpserve.model.rope import rope_table

ARGS = ModelArgs(512, 4, 4, 4, 1000, 1408)
MAX_LEN, BLOCK, ROWS = 512, 16, 160
BATCHES = [1, 2, 4, 8, 16, 32, 64, 96, 128, 160]
DTYPES = [torch.bfloat16, torch.float32]
CPU = torch.device("cpu")

Variant = tuple[str, tuple[tuple[str, str], ...]]


class Kernel:
    """As `triton.jit` makes it: launched, it notes the variant that would be compiled."""

    def __init__(self, function: Callable[..., Any], unspecialized: list[str], seen: set[Variant]) -> None:
        self._function, self._unspecialized, self._seen = function, unspecialized, seen
        self._parameters = list(inspect.signature(function).parameters)

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*args: Any, **named: Any) -> None:
            given = dict(zip(self._parameters, args, strict=False)) | named
            keys = sorted((name, self._key(name, value)) for name, value in given.items())
            self._seen.add((f"{self._function.__module__}.{self._function.__name__}", tuple(keys)))

        return launch

    def _key(self, name: str, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            aligned = name in self._unspecialized or value.data_ptr() % 16 == 0
            return f"{value.dtype} {aligned}"
        if name in self._unspecialized:
            return "any"
        if isinstance(value, int) and name.islower() and name in self._parameters:  # not a constant
            return "1" if value == 1 else str(value % 16 == 0)
        return str(value)


class _Stub(ModuleType):
    """A module that has everything."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **named: None


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Variant]]:
    """What was launched; the modules that launch are imported anew, and forgotten."""
    found: set[Variant] = set()

    def jit(function: Callable[..., Any] | None = None, *, do_not_specialize: list[str] | None = None) -> Any:
        if function is None:
            return lambda other: Kernel(other, do_not_specialize or [], found)
        return Kernel(function, [], found)

    ours = ("tpserve.model.kernels.", "tpserve.model.decode_step", "tpserve.model.fused_", "tpserve.model.residual",
            "tpserve.model.share_exchange", "triton")  # fmt: skip
    for name in [name for name in sys.modules if name.startswith(ours)]:
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            monkeypatch.delattr(sys.modules[parent], child, raising=False)
        monkeypatch.delitem(sys.modules, name)
    for name in ("triton", "triton.language", "triton.language.extra", "triton.language.extra.cuda"):
        monkeypatch.setitem(sys.modules, name, _Stub(name))
    triton: Any = sys.modules["triton"]
    triton.jit, triton.language = jit, sys.modules["triton.language"]
    triton.cdiv, triton.next_power_of_2 = lambda a, b: -(-a // b), lambda n: 1 << (n - 1).bit_length()
    triton.language.int32, triton.language.int64 = "int32", "int64"
    monkeypatch.setattr("tpserve.model.kernels.has_gluon", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **named: None)
    yield found
    for name in [name for name in sys.modules if name.startswith("tpserve.") and name.startswith(ours)]:
        parent, _, child = name.rpartition(".")
        delattr(sys.modules[parent], child)
        del sys.modules[name]


class Ways:
    """A decode step and a mixed one of a random model, on one rank of `size` that is alone.

    Args:
        exchanges: whether sums go through the ranks' memory; otherwise through NCCL.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, exchanges: bool) -> None:
        self._imported = {
            name: importlib.import_module(f"tpserve.model.{name}")
            for name in ("decode_step", "fused_forward", "residual", "kernels.all_reduce", "kernels.row_exchange")
        }
        steps, tp = self._imported["decode_step"], TensorParallel(0, size, None)
        for module in (steps, self._imported["residual"]):  # a CPU multiplies halves into halves
            monkeypatch.setattr(
                module, "head_product", lambda x, w, out=None: (x if out is None else out).new_zeros(len(x), len(w))
            )
        monkeypatch.setattr(TensorParallel, "gather_vocabulary", lambda self, x, v: x.new_zeros(len(x), v))
        rows = self._row_exchange(tp, dtype) if exchanges else None
        monkeypatch.setattr(self._imported["kernels.row_exchange"].RowExchange, "make", lambda *args: rows)
        monkeypatch.setattr(
            steps.DecodeStep, "_make_exchange", lambda step: self._word_exchange(step, tp) if exchanges else None
        )
        model = Llama(ARGS, MAX_LEN).to(dtype)
        shard(model, tp)
        model.to_empty(device=CPU)
        model.rope_PC2 = rope_table(ARGS, MAX_LEN, CPU)
        model.gather = lambda x: x
        cache = PagedKVCache(
            ARGS.n_layers, 64, BLOCK, num_kv_heads(ARGS, tp), ARGS.head_dim, dtype=dtype, device=CPU
        )  # fmt: skip
        tokens_RL, tables_RB = (torch.zeros(ROWS, n, dtype=torch.int64) for n in (MAX_LEN, MAX_LEN // BLOCK))
        self.decode = steps.DecodeStep(model, cache, tp, tokens_RL, tables_RB, BATCHES)
        forward = self._imported["fused_forward"]
        self.mixed = forward.FusedForward(model, self.decode.layers, cache, tp, tables_RB, rows, None)
        self.chunks = forward.Chunks

    def _row_exchange(self, tp: TensorParallel, dtype: torch.dtype) -> Any:
        kind = self._imported["kernels.row_exchange"].RowExchange
        made = kind.__new__(kind)
        made._tp, made._rows, made._programs = tp, 1024, 1024 // tp.size
        made.partial_SD, made.x_SD = (torch.zeros(1024, ARGS.dim, dtype=dtype) for _ in range(2))
        made._partials, made._xs, made._flags, made._counts_P = torch.zeros(4, 16, dtype=torch.int64).unbind()
        return made

    def _word_exchange(self, step: Any, tp: TensorParallel) -> Any:
        kind = self._imported["kernels.all_reduce"].WordExchange
        made = kind.__new__(kind)
        made.tp, made.dim, made.terms, made.per_step, made.step = tp, ARGS.dim, 64, step._per_step, step._count
        made._slot_words = made.terms * tp.size * ARGS.dim
        made.gather_offset = 2 * made._slot_words
        made._words, made.peers = torch.zeros(2, 16, dtype=torch.int64).unbind()
        return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "exchanges"), [(1, False), (2, False), (2, True)])
def test_two_layers_launch_every_variant(
    seen: set[Variant], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, exchanges: bool
) -> None:
    ways = Ways(monkeypatch, dtype, size, exchanges)

    def variants(enqueue: Callable[..., object], *args: object) -> set[Variant]:
        seen.clear()
        with torch.no_grad():
            enqueue(*args)
        return set(seen)

    decoder: Any = FusedDecoder.__new__(FusedDecoder)
    decoder.step, decoder.buckets = ways.decode, BATCHES
    decoder._stage_decodes = lambda *args: None  # no part of a step
    noted, every = variants(decoder.enqueue_all), set[Variant]()
    for s in BATCHES:
        every |= variants(ways.decode.enqueue, s)
    assert len(every) > len(BATCHES)
    assert noted == every
    rows_T, positions_T = torch.zeros(40, dtype=torch.int64), torch.full((40,), -1)
    chunks = ways.chunks(rows_T[:2], torch.tensor([4, 20, 40]), rows_T[:2])
    for asked_N in (None, rows_T[:3]):
        noted, every = (
            variants(ways.mixed, rows_T, rows_T, positions_T, 4, chunks, asked_N, n) for n in (2, None)
        )  # fmt: skip
        assert len(every) > 4
        assert noted == every

"""Which variants of the kernels a step launches: those that were compiled at the start.

They are found by steps of two layers (`FusedNetwork.warm_up`). A variant that only a later layer has, or another number
of tokens, or arrays that lie otherwise, would be compiled while somebody waits. Triton and the exchanges between ranks
are stand-ins: kernels note what would make Triton compile, and compute nothing.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
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

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(n <= 65535 for n in grid[1:]), "CUDA has no such grid"

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


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """As Gluon's, of which a kernel has a variant for each type and block."""

    base: torch.Tensor
    shape: Sequence[int]
    strides: Sequence[int]
    block_shape: Sequence[int]
    layout: object

    def __post_init__(self) -> None:
        assert all(n > 0 for n in self.shape), "shape must be positive"
        assert self.base.data_ptr() % 16 == 0
        assert self.strides[0] * self.base.element_size() % 16 == 0
        assert self.strides[-1] == 1

    def __str__(self) -> str:
        return f"{self.base.dtype} {self.block_shape}"


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

    names = ("kernels.", "chunk_graphs", "decode_step", "fused_", "residual", "share_exchange", "tens_of_rows")
    ours = ("triton", *(f"tpserve.model.{name}" for name in names))
    for name in [name for name in sys.modules if name.startswith(ours)]:
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            monkeypatch.delattr(sys.modules[parent], child, raising=False)
        monkeypatch.delitem(sys.modules, name)
    gluon = "triton.experimental.gluon"
    for name in ("triton", "triton.language", "triton.language.extra", "triton.language.extra.cuda",
                 "triton.experimental", gluon, f"{gluon}.language", f"{gluon}.language.nvidia",
                 f"{gluon}.language.nvidia.hopper", f"{gluon}.nvidia", f"{gluon}.nvidia.hopper"):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, _Stub(name))
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, sys.modules[name])
    triton: Any = sys.modules["triton"]
    triton.jit = triton.experimental.gluon.jit = jit
    triton.experimental.gluon.language.constexpr = lambda value: SimpleNamespace(value=value)
    triton.experimental.gluon.nvidia.hopper.TensorDescriptor = Descriptor
    triton.cdiv, triton.next_power_of_2 = lambda a, b: -(-a // b), lambda n: 1 << (n - 1).bit_length()
    triton.language.int32, triton.language.int64 = "int32", "int64"
    monkeypatch.setattr("tpserve.model.kernels.has_gluon", lambda: False)
    # As many as make products of this size worth their programs.
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=16))
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
        gluon: whether there are the products of tens of rows.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, exchanges: bool, gluon: bool
    ) -> None:
        product = lambda x, w, out=None: x.new_empty(len(x), w.shape[0]) if out is None else out  # noqa: E731
        monkeypatch.setattr("tpserve.model.kernels.mixed.matmul", product)
        monkeypatch.setattr("tpserve.model.tens_of_rows.has_gluon", lambda: gluon)
        monkeypatch.setattr("tpserve.model.tens_of_rows.is_hopper", lambda device: True)
        self._imported = {
            name: importlib.import_module(f"tpserve.model.{name}")
            for name in ("chunk_graphs", "decode_step", "fused_forward", "residual", "kernels.all_reduce",
                         "kernels.row_exchange")
        }  # fmt: skip
        steps, tp = self._imported["decode_step"], TensorParallel(0, size, None)
        for module in (steps, self._imported["residual"]):  # a CPU multiplies halves into halves
            monkeypatch.setattr(
                module, "head_product", lambda x, w, out=None: (x if out is None else out).new_zeros(len(x), len(w))
            )
        monkeypatch.setattr(TensorParallel, "gather_vocabulary", lambda self, x, v: x.new_zeros(len(x), v))
        for collective in ("all_gather", "reduce_scatter"):
            monkeypatch.setattr(self._imported["residual"], collective, lambda *args, **named: None)
        rows = self._row_exchange(tp, dtype) if exchanges else None
        monkeypatch.setattr(self._imported["kernels.row_exchange"].RowExchange, "make", lambda *args: rows)
        monkeypatch.setattr(
            steps.DecodeStep, "_make_exchange", lambda step: self._word_exchange(step, tp) if exchanges else None
        )
        model = Llama(ARGS, MAX_LEN).to(dtype)
        shard(model, tp)
        model.to_empty(device=CPU)
        model.rope_PC2 = rope_table(ARGS, MAX_LEN, CPU)
        model.gather = lambda x: x.new_zeros(len(x), ARGS.vocab_size)
        cache = PagedKVCache(
            ARGS.n_layers, 64, BLOCK, num_kv_heads(ARGS, tp), ARGS.head_dim, dtype=dtype, device=CPU
        )  # fmt: skip
        tokens_RL, tables_RB = (torch.zeros(ROWS, n, dtype=torch.int64) for n in (MAX_LEN, MAX_LEN // BLOCK))
        self.decode = steps.DecodeStep(model, cache, tp, tokens_RL, tables_RB, BATCHES)
        forward = self._imported["fused_forward"]
        shares: Any = _Shares(tp.size, dtype) if exchanges else None
        self.mixed = forward.FusedForward(model, self.decode.layers, cache, tp, tables_RB, rows, shares)
        self.mixed._products.pdl = self.decode._pdl = self.decode._products.pdl = True  # as on a GPU
        self.chunks = forward.Chunks
        self.graphs = self._imported["chunk_graphs"].ChunkGraphs(self.mixed, tokens_RL, ARGS.vocab_size, tp, ROWS)

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


class _Shares:
    """As `ShareExchange`, which some steps are too large for."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self._size, self._dtype = size, dtype

    def fits(self, rows: int) -> bool:
        return rows <= 1100

    def own(self, share: int) -> torch.Tensor:
        return torch.empty(share, ARGS.dim, dtype=self._dtype)

    def times(self, w_ND: Any, share: int, num_rows: int) -> torch.Tensor:
        return torch.empty(num_rows, w_ND.shape[0], dtype=w_ND.q.dtype)

    def parts(self, y_TN: torch.Tensor, w_DN: Any, share: int) -> torch.Tensor:
        return y_TN.new_empty(self._size, share, ARGS.dim)


WAYS = [(1, False, False), (1, False, True), (2, False, True), (2, True, False), (2, True, True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "exchanges", "gluon"), WAYS)
@torch.no_grad()
def test_two_layers_launch_every_variant(
    seen: set[Variant], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, exchanges: bool, gluon: bool
) -> None:
    ways = Ways(monkeypatch, dtype, size, exchanges, gluon)

    def variants(enqueue: Callable[..., object], *args: object) -> set[Variant]:
        seen.clear()
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
            variants(ways.mixed, rows_T, rows_T, positions_T, positions_T[:4], chunks, asked_N, n) for n in (2, None)
        )  # fmt: skip
        assert len(every) > 4
        assert noted == every


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "exchanges", "gluon"), WAYS)
@torch.no_grad()
def test_mixed_steps_launch_what_was_compiled(
    seen: set[Variant], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, exchanges: bool, gluon: bool
) -> None:
    """Of any number of tokens, of sequences that decode and of prompts, and of rows that are asked for; arrays lie one
    behind the other, so that some begin at odd places."""
    ways = Ways(monkeypatch, dtype, size, exchanges, gluon)
    ways.mixed.compile()
    ways.graphs.enqueue(ways.graphs.missing[0], num_layers=2)
    compiled, products, rooms = set(seen), 0, set()
    for tokens in (1, 8, 9, 16, 31, 64, 65, 70, 111, 112, 128, 129, 1024, 1025, 1099, 1100, 1101, 1500):
        for decodes, prompts in ((0, 1), (1, 1), (7, 3), (30, 1), (3, 18)):
            if tokens < decodes + prompts:
                continue
            sent = torch.zeros(3 * tokens + 3 * (prompts + 1) + 40, dtype=torch.int64)
            rows_T, positions_T = sent[:tokens], sent[tokens : 2 * tokens].fill_(-1)
            chunks_3P = sent[2 * tokens : 2 * tokens + 3 * (prompts + 1)].view(3, -1)
            rows_P, starts_P1, contexts_P = chunks_3P
            starts_P1[:] = decodes + torch.arange(prompts + 1) * ((tokens - decodes) // prompts)
            chunks = ways.chunks(rows_P[:-1], starts_P1, contexts_P[:-1])
            for asked in (0, 1, 7, 33, None):
                seen.clear()
                rows_N = None if asked is None else sent[len(sent) - 40 :][:asked]
                room = ways.graphs.room(tokens, [1] * decodes, prompts, tokens if rows_N is None else len(rows_N))
                rooms.add(room)
                ways.mixed(
                    rows_T.clone(), rows_T, positions_T, positions_T[:decodes] if decodes else None, chunks, rows_N
                )
                if room is not None:
                    ways.graphs(room, rows_T, positions_T, decodes, chunks_3P, rows_N)
                assert seen <= compiled, (tokens, decodes, prompts, asked)
                products += any("rows_product" in name or "rows_pairs" in name for name, _ in seen)
    assert bool(products) == (gluon and dtype == torch.bfloat16)
    assert {room and (room.decodes > 0, room.parts) for room in rooms} == {None, (False, 16), (True, 16), (True, ROWS)}


def test_more_rows_than_a_grid_has_places(seen: set[Variant]) -> None:
    pointwise = importlib.import_module("tpserve.model.kernels.pointwise")
    pointwise.silu_mul(*(torch.zeros(140_000, n, dtype=torch.bfloat16) for n in (16, 8)))
    assert len(seen) == 1

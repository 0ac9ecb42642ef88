"""Attention over the paged cache beside torch's over contiguous keys: `python -m tpserve.bench.attention`.

First every kernel is compared with a float64 reference on fresh random inputs (ragged lengths, shuffled blocks,
poisoned outputs); then times are taken in a CUDA graph whose calls go through enough copies of the cache that none of
them finds its keys in the L2 cache, as one layer after the other does in a model. Baselines are
`scaled_dot_product_attention` on contiguous keys. For decoding they get a key/value head's query heads as if they were
queries: the same result without repeated keys. A chunk over a context has no mask there: 3% more work, and the only
form that both backends take.

Exit status 1: a check failed.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import statistics
from collections.abc import Callable, Sequence

import fire
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpserve.bench.record import write_result
from tpserve.model.kernels.paged_attention import choose_splits, decode_scratch, paged_decode_attention
from tpserve.model.kernels.prefill_attention import paged_prefill_attention, prefill_tiles

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = [(32, 32, 128), (16, 2, 128), (32, 8, 64), (6, 2, 16), (4, 4, 8), (2, 1, 80), (4, 2, 256)]
_L2_BYTES = 60 << 20
_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclasses.dataclass(frozen=True)
class Paged:
    """Sequences in a shuffled cache: `lens` keys each, the last `queries` of them with a query.

    Attributes:
        q_THE, k_cache, v_cache, tables_RB: as the kernels take them.
        rows, starts, contexts, lens: int64 [P], int64 [P + 1], int32 [P], int32 [P].
        slots: of every sequence's keys.
    """

    q_THE: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    tables_RB: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor
    contexts: torch.Tensor
    lens: torch.Tensor
    slots: list[torch.Tensor]
    block_size: int

    def decode(self, num_splits: int | None = None) -> torch.Tensor:
        """`paged_decode_attention` into a poisoned output."""
        S, H, E = self.q_THE.shape
        splits = num_splits or choose_splits(S, H, self.k_cache.shape[1], E, int(self.lens.max()), 132)
        scratch, out = decode_scratch(S, H, E, splits, self.q_THE.device), torch.full_like(self.q_THE, float("nan"))
        paged_decode_attention(
            self.q_THE, self.k_cache, self.v_cache, self.tables_RB, self.rows, self.lens, out, scratch,
            block_size=self.block_size, num_splits=splits,
        )  # fmt: skip
        assert not scratch.arrived.any(), "a counter was left behind"
        return out

    def prefill(self) -> torch.Tensor:
        """`paged_prefill_attention` into a poisoned output."""
        out = torch.full_like(self.q_THE, float("nan"))
        paged_prefill_attention(
            self.q_THE, self.k_cache, self.v_cache, self.tables_RB, self.tiles(), out, block_size=self.block_size
        )
        return out

    def tiles(self) -> torch.Tensor:
        """Of `prefill`."""
        T, H, E = self.q_THE.shape
        K = self.k_cache.shape[1]
        return prefill_tiles(self.rows, self.starts, self.contexts, T, H, K, E, self.q_THE.dtype)

    def reference(self) -> torch.Tensor:
        """The same in float64, a sequence at a time."""
        out = torch.zeros_like(self.q_THE, dtype=torch.float64)
        groups = self.q_THE.shape[1] // self.k_cache.shape[1]
        for p, slots in enumerate(self.slots):
            rows = slice(int(self.starts[p]), int(self.starts[p + 1]))
            if not len(slots) or rows.start == rows.stop:
                continue
            q_HQE = self.q_THE[rows].double().transpose(0, 1)
            k_HLE = self.k_cache[slots].double().transpose(0, 1).repeat_interleave(groups, 0)
            v_HLE = self.v_cache[slots].double().transpose(0, 1).repeat_interleave(groups, 0)
            score = q_HQE @ k_HLE.transpose(1, 2) / q_HQE.shape[-1] ** 0.5
            last = int(self.contexts[p]) + torch.arange(q_HQE.shape[1], device=score.device)
            hidden = torch.arange(len(slots), device=score.device) > last[:, None]
            out[rows] = (score.masked_fill(hidden, float("-inf")).softmax(-1) @ v_HLE).transpose(0, 1)
        return out


def paged(
    contexts: list[int],
    queries: list[int],
    *,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    device: str = "cuda",
    block_size: int = 16,
    index: torch.dtype = torch.int64,
) -> Paged:
    """Random sequences in random blocks; slots that no sequence owns hold nan."""
    lens = [context + query for context, query in zip(contexts, queries, strict=True)]
    blocks = [-(-n // block_size) for n in lens]
    pool = torch.randperm(sum(blocks) + 3, device=device)
    rows = torch.randperm(len(lens) + 2, device=device)[: len(lens)]
    tables_RB = torch.full((len(lens) + 2, max(*blocks, 1) + 1), 2**30, dtype=index, device=device)
    size = (len(pool) * block_size, kv_heads, width)
    k_cache, v_cache = (torch.full(size, float("nan"), dtype=dtype, device=device) for _ in range(2))
    slots = []
    for p, count in enumerate(blocks):
        own, pool = pool[:count], pool[count:]
        tables_RB[rows[p], :count] = own.to(index)
        slots.append((own[:, None] * block_size + torch.arange(block_size, device=device)).flatten()[: lens[p]])
        for cache in (k_cache, v_cache):
            cache[slots[p]] = torch.randn(lens[p], kv_heads, width, device=device).to(dtype)
    starts = torch.tensor([0, *queries], device=device).cumsum(0)
    # Queries are a slice of a wider row, as they are after a fused projection.
    q_THE = torch.randn(sum(queries), heads + 2 * kv_heads, width, device=device).to(dtype)[:, :heads]
    return Paged(
        q_THE, k_cache, v_cache, tables_RB, rows.to(index), starts,
        torch.tensor(contexts, dtype=torch.int32, device=device), torch.tensor(lens, dtype=torch.int32, device=device),
        slots, block_size,
    )  # fmt: skip


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − ref‖ / ‖ref‖."""
    return float((out.double() - reference).norm() / reference.norm())


def ragged(count: int, longest: int) -> list[int]:
    """Random lengths with the awkward ones among them."""
    lens = [random.randint(1, longest) for _ in range(count)]
    return [1, 15, 16, 17, 63, 64, 65, longest, *lens][:count] if count > 8 else lens


def check() -> dict[str, float]:
    """The worst error of each kind; raises where one is over its limit."""
    worst: dict[str, float] = {}
    for dtype, limit in LIMITS.items():
        for heads, kv_heads, width in SHAPES:
            for block_size in (16, 32):
                make = functools.partial(
                    paged, heads=heads, kv_heads=kv_heads, width=width, dtype=dtype, block_size=block_size
                )
                decoding = [n - 1 for n in ragged(33, 900)]
                case = make(decoding, [1] * 33)
                case.lens[3::5] = 0
                reference = case.reference()
                reference[3::5] = 0
                for num_splits in (None, 1, 7):
                    out = case.decode(num_splits)
                    assert not out[3::5].any(), "padding must be 0"
                    _note(worst, f"decode {dtype}", error(out, reference), limit)
                case = make(ragged(1, 2000), [1])
                _note(worst, f"decode 1 {dtype}", error(case.decode(), case.reference()), limit)
                queries = [1, 0, 37, 200, *ragged(4, 150)]
                contexts = [9, 3, 0, 0, *ragged(4, 400)]
                case = make(contexts, queries, index=torch.int32)
                _note(worst, f"prefill {dtype}", error(case.prefill(), case.reference()), limit)
    return worst


def _note(worst: dict[str, float], what: str, value: float, limit: float) -> None:
    worst[what] = max(worst.get(what, 0.0), value)
    if not value < limit:  # nan is not under any limit
        raise SystemExit(f"{what}: relative error {value:.2e}, limit {limit:.0e}")


def time_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median microseconds of a call, replayed in one graph; every call should have a cache of its own."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(calls) * 1e3)
    return round(float(statistics.median(times)), 2)


def measure_decode(heads: int, kv_heads: int, lens: list[int], block_size: int) -> dict[str, float]:
    """Microseconds of a call, bfloat16, E = 128; the baselines only where all sequences are equally long."""
    E, dtype, S, length = 128, torch.bfloat16, len(lens), max(lens)
    bytes_each = 2 * sum(lens) * kv_heads * E * 2
    make = functools.partial(paged, heads=heads, kv_heads=kv_heads, width=E, dtype=dtype, block_size=block_size)
    cases = [make([n - 1 for n in lens], [1] * S) for _ in range(min(max(2, -(-4 * _L2_BYTES // bytes_each)), 40))]
    # As captured in an engine: for sequences that may grow to 16384 tokens.
    splits = choose_splits(S, heads, kv_heads, E, 16384, torch.cuda.get_device_properties().multi_processor_count)
    scratch = decode_scratch(S, heads, E, splits, cases[0].q_THE.device)
    out = torch.empty(S, heads, E, dtype=dtype, device="cuda")

    def ours(c: Paged) -> Callable[[], object]:
        return lambda: paged_decode_attention(
            c.q_THE, c.k_cache, c.v_cache, c.tables_RB, c.rows, c.lens, out, scratch,
            block_size=block_size, num_splits=splits,
        )  # fmt: skip

    rounds = max(1, 16 // len(cases))
    figures = {"paged": time_us([ours(c) for c in cases] * rounds)}
    figures = {"splits": splits, "TB/s": round(bytes_each / figures["paged"] / 1e6, 2)} | figures
    if min(lens) != length:
        return figures
    triples = []
    for c in cases:
        k, v = (cache[: S * length].nan_to_num(0.5).view(S, length, kv_heads, E) for cache in (c.k_cache, c.v_cache))
        triples.append((c.q_THE.reshape(S, kv_heads, -1, E), k.transpose(1, 2), v.transpose(1, 2)))
    for name, backend in _BACKENDS.items():
        with sdpa_kernel(backend):
            calls = [functools.partial(F.scaled_dot_product_attention, *triple) for triple in triples]
            figures[name] = time_us(calls * rounds)
    return figures


def measure_prefill(heads: int, kv_heads: int, P: int, queries: int, context: int, block_size: int) -> dict[str, float]:
    """Microseconds of a call, bfloat16, E = 128."""
    E, dtype, L = 128, torch.bfloat16, context + queries
    c = paged([context] * P, [queries] * P, heads=heads, kv_heads=kv_heads, width=E, dtype=dtype, block_size=block_size)
    out = torch.empty(P * queries, heads, E, dtype=dtype, device="cuda")
    tiles = c.tiles()

    def call() -> None:
        paged_prefill_attention(c.q_THE, c.k_cache, c.v_cache, c.tables_RB, tiles, out, block_size=block_size)

    figures = {"paged": time_us([call] * 10)}
    q = c.q_THE.reshape(P, queries, heads, E).transpose(1, 2)
    k, v = (
        cache[: P * L].nan_to_num(0.5).view(P, L, kv_heads, E).transpose(1, 2).repeat_interleave(heads // kv_heads, 1)
        for cache in (c.k_cache, c.v_cache)
    )
    for name, backend in _BACKENDS.items():
        with sdpa_kernel(backend):
            figures[name] = time_us([lambda: F.scaled_dot_product_attention(q, k, v, is_causal=not context)] * 10)
    flop = 4 * P * heads * E * (queries * context + queries * (queries + 1) / 2)
    return {"TFLOP/s": round(flop / figures["paged"] / 1e6)} | figures


DECODE = [(32, 32, [n] * S) for S in (1, 8) for n in (128, 1024, 4096, 16384)]
DECODE += [(32, 32, [n] * 64) for n in (128, 1024)]
DECODE += [(16, 2, [n] * S) for S, n in ((1, 1024), (8, 1024), (64, 1024), (64, 4096))]
DECODE += [(heads, kv_heads, [1024] * S) for heads, kv_heads in ((32, 8), (16, 16), (8, 8)) for S in (1, 8, 64)]
DECODE += [(heads, kv_heads, [16384] + [256] * 63) for heads, kv_heads in ((32, 32), (32, 8), (16, 2))]
PREFILL = [(32, 32, 1, 1024, 0), (32, 32, 8, 1024, 0), (32, 32, 1, 512, 8192), (16, 2, 8, 1024, 0), (32, 8, 8, 1024, 0)]


def main(checks_only: bool = False) -> None:
    """Checks, then measures.

    Args:
        checks_only: stop after the checks.
    """
    figures: dict[str, object] = {"worst relative errors": check()}
    if checks_only:
        print(figures)
        return
    for heads, kv_heads, lens in DECODE:
        for block_size in (16, 32):
            row = measure_decode(heads, kv_heads, lens, block_size)
            name = f"S{len(lens)} L{lens[0]}" + (f"+{len(lens) - 1}x{lens[-1]}" if lens[-1] != lens[0] else "")
            figures[f"decode H{heads} K{kv_heads} {name} block{block_size}"] = row
    for heads, kv_heads, P, queries, context in PREFILL:
        for block_size in (16, 32):
            row = measure_prefill(heads, kv_heads, P, queries, context, block_size)
            figures[f"prefill H{heads} K{kv_heads} {P}x{queries} after {context} block{block_size}"] = row
    device = torch.cuda.get_device_name().replace(" ", "-").lower()
    write_result(f"attention-{device}", "python -m tpserve.bench.attention", figures)


if __name__ == "__main__":
    fire.Fire(main)

"""Attention over the paged cache beside torch's over contiguous keys: `python -m tpserve.bench.attention`.

First every kernel is compared with a float64 reference on fresh random inputs (ragged lengths, shuffled blocks,
poisoned outputs); then times are taken in a CUDA graph whose calls go through enough copies of the cache that none of
them finds its keys in the L2 cache, as one layer after the other does in a model; `early` is the kernel as decode steps
launch it, while the one in front of it ends. Baselines are `scaled_dot_product_attention` on contiguous keys. For
decoding they get a key/value head's query heads as if they were queries: the same result without repeated keys. A chunk
over a context has no mask there: 3% more work, and the only form that both backends take.

Exit status 1: a check failed.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence

import fire
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpserve.bench.attention_cases import LIMITS, SHAPES, Paged, error, paged, ragged
from tpserve.bench.record import write_result
from tpserve.model.kernels import hopper_takes
from tpserve.model.kernels.decode_plan import deal, decode_scratch
from tpserve.model.kernels.precompile import compiled_together
from tpserve.model.kernels.prefill_attention import paged_prefill_attention
from tpserve.model.parallel import TensorParallel

_L2_BYTES = 60 << 20
_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def check() -> dict[str, float]:
    """The worst error of each kind; raises where one is over its limit."""
    every = list(_checks())
    with compiled_together(torch.device("cuda", torch.cuda.current_device()), TensorParallel(0, 1, None)):
        for _, _, run, _ in every:
            run()
    worst: dict[str, float] = {}
    for what, limit, run, expected in every:
        out, reference = run(), expected()
        if out[(reference == 0).flatten(1).all(1)].any():
            raise SystemExit(f"{what}: padding must be 0")
        value = error(out, reference)
        worst[what] = max(worst.get(what, 0.0), value)
        if not value < limit:  # nan is not under any limit
            raise SystemExit(f"{what}: relative error {value:.2e}, limit {limit:.0e}")
    return worst


Check = tuple[str, float, Callable[[], torch.Tensor], Callable[[], torch.Tensor]]


def _checks() -> Iterator[Check]:
    """(what, its limit, how it is made, what it should be) of every kernel."""
    for dtype, limit in LIMITS.items():
        for heads, kv_heads, width in SHAPES:
            for block_size in (16, 32):
                make = functools.partial(
                    paged, heads=heads, kv_heads=kv_heads, width=width, dtype=dtype, block_size=block_size
                )
                case = make([n - 1 for n in ragged(33, 900)], [1] * 33)
                case.lens[3::5] = 0
                one = make(ragged(1, 2000), [1])
                for kind, cut in case.cuts().items():
                    for items in (33, 38, cut.items, 231):
                        run = functools.partial(case.decode, dataclasses.replace(cut, items=items))
                        yield f"decode{kind} {dtype}", limit, run, functools.partial(_without_padding, case)
                for kind, cut in one.cuts().items():
                    yield f"decode 1{kind} {dtype}", limit, functools.partial(one.decode, cut), one.reference
                queries = [1, 0, 37, 200, *ragged(4, 150)]
                contexts = [9, 3, 0, 0, *ragged(4, 400)]
                case = make(contexts, queries, index=torch.int32)
                yield f"prefill {dtype}", limit, functools.partial(case.prefill, hopper_rows=1 << 40), case.reference
                if hopper_takes(case.k_cache, dtype, block_size):
                    run = functools.partial(case.prefill, hopper_rows=0)
                    yield f"prefill Hopper {dtype}", limit, run, case.reference


def _without_padding(case: Paged) -> torch.Tensor:
    reference = case.reference()
    reference[case.lens == 0] = 0
    return reference


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
    processors = torch.cuda.get_device_properties().multi_processor_count
    cut = cases[0].cut(16384, processors)
    # Items are dealt once a step, for all layers.
    every = [decode_scratch(S, heads, E, cut.items, c.q_THE.device) for c in cases]
    for c, scratch in zip(cases, every, strict=True):
        deal(cut, scratch, c.rows, c.lens - 1)
    out = torch.empty(S, heads, E, dtype=dtype, device="cuda")

    def ours(early: bool) -> list[Callable[[], object]]:
        return [
            functools.partial(c.decode_into, out, cut, scratch, early) for c, scratch in zip(cases, every, strict=True)
        ]

    rounds = max(1, 16 // len(cases))
    figures = {name: time_us(ours(name == "early") * rounds) for name in ("paged", "early")}
    figures = {"items": cut.items, "TB/s": round(bytes_each / figures["paged"] / 1e6, 2)} | figures
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
PREFILL += [(32, 32, 16, 512, 0), (32, 32, 4, 2048, 0), (8, 8, 8, 1024, 0), (64, 8, 1, 2048, 6144)]


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

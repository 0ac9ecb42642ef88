"""What a step needs, what the device can do, and how near it came: `python -m tpserve.bench.roofline [--device cuda]`.

The roofline model (Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", CACM 52(4), 2009): a step can take no less than its bytes at the memory's bandwidth, nor less than its
operations at the processors' rate; the longer of both is its bound. Both ceilings are measured on the device itself,
when it is used for nothing else: the best of a few reads of a buffer that no cache holds, and of large products.

Counted are what no implementation can save. Bytes: each weight once but the embedding, of which a step reads a few
rows; keys and values, read by a decode step, written by a prefill. Operations: two for each weight and token (the last
matrix for the last token only), and 4 x width for each pair of a query and a key that it sees (Kaplan et al., "Scaling
laws for neural language models", 2020, table 1). Not counted: activations, and what ranks tell each other.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import fire

from tpserve.model.args import ModelArgs

if TYPE_CHECKING:
    import torch

_REPEATS = 6
_GPU_BYTES, _CPU_BYTES = 2 << 30, 256 << 20  # far beyond caches
_GPU_WIDTH, _CPU_WIDTH = 8192, 1024


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes that are moved and floating-point operations that are done, at least."""

    bytes: float
    flop: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flop + other.flop)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a device was measured to do: bytes read a second, and operations of products of `dtype` a second."""

    device: str
    dtype: str
    bytes_per_s: float
    flop_per_s: float


# For results that were written before ceilings were measured with them.
H200 = Ceilings("NVIDIA H200", "bfloat16", 4.24e12, 790e12)


def _layer_weights(args: ModelArgs) -> int:
    """Of all layers: queries, keys, values and output, and the three matrices of the feed-forward block."""
    heads = 2 * args.n_heads + 2 * args.n_kv_heads
    return args.n_layers * args.dim * (heads * args.head_dim + 3 * args.ffn_hidden_dim)


def _kv_bytes(args: ModelArgs, tokens: int, itemsize: int) -> int:
    return 2 * args.n_layers * tokens * args.n_kv_heads * args.head_dim * itemsize


# Bytes of a weight with fewer bits: of int8 and fp8 without the scale of a row, of int4 with those of 128 inputs.
BLOCK_BYTES = {"": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5 + 8 / 128}


def decode(
    args: ModelArgs,
    tp: int,
    batch: int,
    context: int,
    itemsize: int,
    *,
    block_bytes: float | None = None,
    kv_bytes: int | None = None,
) -> Work:
    """One rank's part of a step that makes a token of each of `batch` sequences of `context` tokens.

    Args:
        args: the model's shape.
        tp: ranks; each is taken to have the same part.
        batch, context: see above.
        itemsize: bytes of a weight and of an element of the KV cache.
        block_bytes: of a weight of the blocks, scales included; None: `itemsize`.
        kv_bytes: of an element of the KV cache; None: `itemsize`.
    """
    blocks, head = _layer_weights(args), args.vocab_size * args.dim
    attention = 4 * args.n_layers * args.n_heads * args.head_dim * batch * context
    weight_bytes = itemsize * head + (itemsize if block_bytes is None else block_bytes) * blocks
    return Work(
        (weight_bytes + _kv_bytes(args, batch * context, itemsize if kv_bytes is None else kv_bytes)) / tp,
        (2 * batch * (blocks + head) + attention) / tp,
    )


def prefill(
    args: ModelArgs, tp: int, prompts: int, length: int, itemsize: int, *, block_bytes: float | None = None
) -> Work:
    """One rank's part of computing `prompts` prompts of `length` tokens, and the first token of each answer; see
    `decode`."""
    ends = args.vocab_size * args.dim
    seen = prompts * length * (length + 1) // 2
    attention = 4 * args.n_layers * args.n_heads * args.head_dim * seen
    blocks = _layer_weights(args) * (itemsize if block_bytes is None else block_bytes)
    return Work(
        (blocks + itemsize * ends + _kv_bytes(args, prompts * length, itemsize)) / tp,
        (2 * prompts * (length * _layer_weights(args) + ends) + attention) / tp,
    )


def together(decoded: Work, prompt: Work, *, without: Work) -> Work:
    """A step of both, which reads the weights once: `without` is the prompt's work without a prompt."""
    return Work(decoded.bytes + prompt.bytes - without.bytes, decoded.flop + prompt.flop - without.flop)


def judge(work: Work, ceilings: Ceilings, ms: float, steps: int = 1) -> dict[str, Any]:
    """A result's roofline.

    Args:
        work: of a step.
        ceilings: of the device.
        ms: that it took.
        steps: like `work` that those `ms` held.

    Returns:
        "gbytes", "gflop", "floor_ms" of all steps; "bound" ("memory" or "compute"); "share": floor by time; and the
        ceilings "tb_per_s" and "tflop_per_s".
    """
    memory_ms, compute_ms = 1e3 * work.bytes / ceilings.bytes_per_s, 1e3 * work.flop / ceilings.flop_per_s
    floor_ms = steps * max(memory_ms, compute_ms)
    return {
        "gbytes": steps * work.bytes / 1e9, "gflop": steps * work.flop / 1e9, "ms": ms, "floor_ms": floor_ms,
        "bound": "memory" if memory_ms >= compute_ms else "compute", "share": floor_ms / ms,
        "tb_per_s": ceilings.bytes_per_s / 1e12, "tflop_per_s": ceilings.flop_per_s / 1e12,
    }  # fmt: skip


def judge_run(parts: list[tuple[Work, int]], ceilings: Ceilings, ms: float) -> dict[str, Any]:
    """Of several kinds of step one after another, each with its own bound; "bound" is that of most of the floor."""
    each = [judge(work, ceilings, ms, steps) for work, steps in parts if steps]
    floor_ms = sum(one["floor_ms"] for one in each)
    of_bound = {bound: sum(o["floor_ms"] for o in each if o["bound"] == bound) for bound in ("memory", "compute")}
    return {
        **each[0],
        "gbytes": sum(one["gbytes"] for one in each),
        "gflop": sum(one["gflop"] for one in each),
        "floor_ms": floor_ms,
        "bound": max(of_bound, key=lambda bound: of_bound[bound]),
        "share": floor_ms / ms,
    }


def of_row(
    row: dict[str, Any], args: ModelArgs, tp: int, ceilings: Ceilings, itemsize: int, block_bytes: float | None = None
) -> dict[str, Any]:
    """Rooflines of a row of `engine_runs`, by the name of what is judged.

    A latency row has its prefill (the time to the first token) and its decode step, at the middle of the answer. A
    throughput row has the whole run: every prompt in one prefill, then every sequence in each step.

    Args:
        row: of `latency` or `throughput`.
        args: the model's shape.
        tp: ranks; 1 where they share one device.
        ceilings: of a rank's device.
        itemsize: bytes of a weight.
        block_bytes: of one of the blocks; None: `itemsize`.
    """
    batch, length, new = row["batch"], row["in"], row["out"]
    first = prefill(args, tp, batch, length, itemsize, block_bytes=block_bytes)
    step = decode(args, tp, batch, length + new // 2, itemsize, block_bytes=block_bytes)
    if row["kind"] == "lat":
        return {
            "first token": judge(first, ceilings, row["ttft_ms"]),
            "a step": judge(step, ceilings, row["step_ms"]),
        }
    if row["kind"] == "thr":
        ms = 1e3 * batch * new / row["tokens_per_s"]
        return {"the run": judge_run([(first, 1), (step, new - 1)], ceilings, ms)}
    return {}


def line(label: str, one: dict[str, Any]) -> str:
    """One result in one line."""
    return (
        f"roofline, {label}: {_si(1e9 * one['gbytes'])}B and {_si(1e9 * one['gflop'])}FLOP; this device "
        f"{_si(1e12 * one['tb_per_s'])}B/s, {_si(1e12 * one['tflop_per_s'])}FLOP/s; floor {one['floor_ms']:.3g} ms of "
        f"{one['ms']:.3g}: {one['share']:.0%}, {one['bound']}-bound"
    )


def _si(value: float) -> str:
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g} "


def measure(device: torch.device, dtype: str) -> Ceilings:
    """Measures, for about a second; frees what it took."""
    import torch  # what is counted above is for reports too, which do without

    gpu = device.type == "cuda"
    kind = getattr(torch, dtype)
    num_bytes, width = (_GPU_BYTES, _GPU_WIDTH) if gpu else (_CPU_BYTES, _CPU_WIDTH)
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    matrix = torch.ones(num_bytes // kind.itemsize // width, width, dtype=kind, device=device)
    vector = torch.ones(width, dtype=kind, device=device)
    seconds = min(_best_s(buffer.sum, device), _best_s(functools.partial(torch.mv, matrix, vector), device))
    del buffer, matrix
    left, right = (torch.randn(width, width, device=device).to(kind) for _ in range(2))
    product_s = _best_s(functools.partial(torch.mm, left, right), device)
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    found = Ceilings(name, dtype, num_bytes / seconds, 2 * width**3 / product_s)
    del left, right, vector
    if gpu:
        torch.cuda.empty_cache()
    return found


def _best_s(what: Callable[[], Any], device: torch.device) -> float:
    import torch

    gpu = device.type == "cuda"
    calls = 10 if gpu else 1  # the way to the device and back is shared by so many
    times = []
    for _ in range(_REPEATS):
        if gpu:
            torch.cuda.synchronize(device)
        started_s = time.perf_counter()
        for _ in range(calls):
            what()
        if gpu:
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - started_s) / calls)
    return min(times)


def measured(device: str, dtype: str, ranks: int = 1) -> Ceilings:
    """The same in a process of its own, which leaves nothing on the device that an engine is to fill.

    Args:
        device: "cuda" (the first one) or "cpu".
        dtype: of the products.
        ranks: that share a CPU: they have so many times a rank's threads together.

    Raises:
        RuntimeError: it failed.
    """
    threads = ranks * int(os.environ.get("OMP_NUM_THREADS", "1")) if device == "cpu" else 0
    command = [sys.executable, "-m", "tpserve.bench.roofline", "--device", device, "--dtype", dtype,
               "--threads", str(threads)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the device's ceilings could not be measured: {done.stderr[-500:]}")
    return Ceilings(**json.loads(done.stdout.splitlines()[-1]))


def main(device: str = "cuda", dtype: str = "bfloat16", threads: int = 0) -> None:
    """Prints the ceilings as one line of JSON.

    Args:
        device: "cuda" or "cpu".
        dtype: of the products.
        threads: of a CPU; 0: as many as torch takes.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    print(json.dumps(dataclasses.asdict(measure(torch.device(device), dtype))))


if __name__ == "__main__":
    fire.Fire(main)

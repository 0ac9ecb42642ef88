"""Where a step's time goes on a GPU, kernel by kernel: `python -m tpserve.bench.kernel_times --model 7B`.

Steps of the network alone, at a model's real shapes with random weights: prompts of `--prefill` tokens, steps that
decode, of `--decode` batch x context, and both, of `--mixed` batch x context + tokens of one prompt. For each: the
median time by the device's clock; the floor of `roofline`, by the ceilings that this device is measured to have before;
what launching it takes the host; every kernel's calls and time, by torch's profiler; and the gap: the step's time less
its kernels' (negative where they overlap).
Several ranks: `torchrun --nproc-per-node 2 -m tpserve.bench.kernel_times --tp 2 …`.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import fire
import torch
import torch.distributed as dist

from tpserve.bench import roofline
from tpserve.bench.decode_step import MODELS, random_model
from tpserve.bench.record import write_result
from tpserve.model.attention import SequenceSlice
from tpserve.model.fused_network import FusedNetwork
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.network import StepInputs
from tpserve.model.parallel import TensorParallel, num_kv_heads, without_multicast
from tpserve.model.quantized import quantize

_BLOCK_SIZE = 16


class Steps:
    """A network with a cache large enough for every step.

    Args:
        model: a key of `MODELS`.
        tp: this rank's place.
        device: of this rank.
        batch: the largest.
        length: the longest sequence.
        tokens: that the cache holds.
        quantization: of the blocks' weights, one of `SCHEMES`; empty: none.
        kv_dtype: of the cache.
    """

    def __init__(
        self,
        model: str,
        tp: TensorParallel,
        device: torch.device,
        batch: int,
        length: int,
        tokens: int,
        quantization: str = "",
        kv_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.args, self._device = MODELS[model], device
        num_blocks = tokens // _BLOCK_SIZE + batch
        llama = random_model(self.args, tp, device, max_len=length + 1)
        if quantization:
            quantize(llama, quantization)
        self._cache = PagedKVCache(
            self.args.n_layers, num_blocks, _BLOCK_SIZE, num_kv_heads(self.args, tp), self.args.head_dim,
            dtype=kv_dtype, device=device,
        )  # fmt: skip
        for tensor in (*self._cache.k, *self._cache.v):
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.bfloat16, device=device))
        generator = torch.Generator().manual_seed(1)
        self._order = torch.randperm(num_blocks, generator=generator).to(device)
        tokens_RL = torch.randint(self.args.vocab_size, (batch, length + 1), generator=generator).to(device)
        self._tables_RB = torch.zeros(batch, -(-length // _BLOCK_SIZE), dtype=torch.int64, device=device)
        self.network = FusedNetwork(
            llama, self._cache, tokens_RL, self._tables_RB, tp, max_num_seqs=batch, graphs=True
        )  # fmt: skip
        with torch.inference_mode():
            self.network.warm_up()
            while self.network.improvable:
                self.network.improve(idle=True)

    def prefill(self, num_tokens: int, each: int = 512) -> StepInputs:
        """Prompts of up to `each` tokens, `num_tokens` together; up to 1,024 are one prompt."""
        n, each = _prompts(num_tokens, each)
        self._lay_out(n, each)
        rows = torch.arange(n, device=self._device).repeat_interleave(each)
        positions = torch.arange(each, device=self._device).repeat(n)
        starts = [i * each for i in range(n + 1)]
        chunks = torch.tensor([[*range(n), 0], starts, [0] * (n + 1)], device=self._device)
        lasts = torch.tensor([start - 1 for start in starts[1:]], device=self._device)
        return StepInputs(rows, positions, [], [SequenceSlice(0, each)] * n, chunks, lasts)

    def decode(self, batch: int, context: int) -> StepInputs:
        """One token of each of `batch` sequences of `context` tokens."""
        self._lay_out(batch, context)
        rows = torch.arange(batch, device=self._device)
        return StepInputs(rows, torch.full_like(rows, context - 1), [context] * batch, [], None, None)

    def mixed(self, batch: int, context: int, num_tokens: int) -> StepInputs:
        """One token of each of `batch` sequences of `context` tokens, and a prompt of `num_tokens`."""
        self._lay_out(batch + 1, max(context, num_tokens))
        rows = torch.cat([torch.arange(batch), torch.full((num_tokens,), batch)]).to(self._device)
        positions = torch.cat([torch.full((batch,), context - 1), torch.arange(num_tokens)]).to(self._device)
        end = batch + num_tokens
        chunks = torch.tensor([[batch, 0], [batch, end], [0, 0]], device=self._device)
        asked = torch.tensor([*range(batch), end - 1], device=self._device)
        prompt = SequenceSlice(0, num_tokens)
        return StepInputs(rows, positions, [context] * batch, [prompt], chunks, asked)

    def _lay_out(self, n: int, length: int) -> None:
        blocks = -(-length // _BLOCK_SIZE)
        self._tables_RB[:n, :blocks] = self._order[: n * blocks].view(n, blocks)


def _prompts(num_tokens: int, each: int = 512) -> tuple[int, int]:
    """How many prompts of how many tokens."""
    each = num_tokens if num_tokens <= 1024 else each
    return -(-num_tokens // each), each


@torch.inference_mode()
def time_ms(step: Callable[[], Any], repeats: int = 5, steps: int = 10) -> float:
    """Median over `repeats` of the mean of `steps` in a row, by the device's clock."""
    times = []
    for repeat in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        if repeat:  # the first warms up
            times.append(start.elapsed_time(end) / steps)
    return float(statistics.median(times))


@torch.inference_mode()
def host_ms(step: Callable[[], Any], repeats: int = 7) -> float:
    """Median of what it takes to enqueue a step, with nothing in front of it."""
    times_s = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        step()
        times_s.append(time.perf_counter() - start_s)
    return 1e3 * statistics.median(times_s)


@torch.inference_mode()
def kernels(step: Callable[[], Any], steps: int = 3) -> list[dict[str, Any]]:
    """Kernels of a step, longest together first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    rows = [
        {"kernel": event.key[:70], "calls": event.count / steps, "ms": event.self_device_time_total / steps / 1e3}
        for event in profile.key_averages()
        if event.self_device_time_total
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def main(
    model: str = "7B",
    tp: int = 1,
    prefill: str = "128,1024,8192",
    decode: str = "1x128,8x1024,64x640,256x640",
    mixed: str = "8x640+16,32x640+16,64x640+16,64x640+128",
    shown: int = 14,
    quantization: str = "",
    kv_cache_dtype: str = "",
) -> None:
    """Prints the tables.

    Args:
        model: a key of `decode_step.MODELS`.
        tp: ranks.
        prefill: numbers of tokens.
        decode: batches and contexts.
        mixed: batches, contexts, and tokens of a prompt.
        shown: kernels of each step.
        quantization: of the blocks' weights, one of `SCHEMES`; empty: none.
        kv_cache_dtype: "fp8", or empty.
    """
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    if tp > 1:
        without_multicast()
        dist.init_process_group("nccl", device_id=device)
    group = TensorParallel.from_world()
    ceilings = roofline.measure(device, "bfloat16")
    prefills = [int(x) for x in str(prefill).strip("()").split(",") if x.strip()]
    decodes = [(int(b), int(c)) for b, c in (pair.split("x") for pair in str(decode).strip("()").split(",") if pair)]
    both = [
        (*map(int, pair.split("x")), int(n))
        for pair, n in (x.split("+") for x in str(mixed).strip("()").split(",") if x)
    ]
    batch = max([b for b, _ in decodes] + [1 + n // 512 for n in prefills] + [b + 1 for b, _, _ in both])
    steps = Steps(
        model, group, device, batch, max([c for _, c in decodes] + [1024] + [max(c, n) for _, c, n in both]),
        max([b * (c + 16) for b, c in decodes] + prefills + [(b + 1) * (max(c, n) + 16) for b, c, n in both]),
        quantization, torch.float8_e4m3fn if kv_cache_dtype else torch.bfloat16,
    )  # fmt: skip
    results = []
    args = steps.args
    read: dict[str, Any] = {"block_bytes": roofline.BLOCK_BYTES[quantization], "kv_bytes": 1 if kv_cache_dtype else 2}
    wanted: list[tuple[str, Callable[[], StepInputs], roofline.Work]] = [
        *((f"prefill {n}", partial(steps.prefill, n), roofline.prefill(args, tp, *_prompts(n), 2)) for n in prefills),
        *((f"decode {b}x{c}", partial(steps.decode, b, c), roofline.decode(args, tp, b, c, 2, **read))
          for b, c in decodes),
        *((f"mixed {b}x{c}+{n}", partial(steps.mixed, b, c, n),
           roofline.together(roofline.decode(args, tp, b, c, 2, **read), roofline.prefill(args, tp, 1, n, 2),
                             without=roofline.prefill(args, tp, 0, n, 2)))
          for b, c, n in both),
    ]  # fmt: skip
    for name, make, work in wanted:
        inputs = make()  # now: steps' tables share memory

        def run(inputs: StepInputs = inputs) -> Any:
            return steps.network(inputs)

        ms = time_ms(run)
        launch_ms = host_ms(run)
        table = kernels(run)
        own_ms = sum(row["ms"] for row in table)
        judged = roofline.judge(work, ceilings, ms)
        results.append(
            {"step": name, "ms": ms, "floor_ms": judged["floor_ms"], "bound": judged["bound"], "gap_ms": ms - own_ms,
             "launch_ms": launch_ms, "roofline": judged, "kernels": table[:shown]}
        )  # fmt: skip
        if group.rank == 0:
            print(f"\n{model} TP{tp} {name}: {ms:.3f} ms; kernels {own_ms:.3f} ms, gap {ms - own_ms:.3f} ms; "
                  f"the host launches them in {launch_ms:.3f} ms")  # fmt: skip
            print(f"  {roofline.line(name, judged)}", flush=True)
            for row in table[:shown]:
                print(f"  {row['ms']:8.3f} ms {row['calls']:7.1f} x {1e3 * row['ms'] / row['calls']:8.2f} us  "
                      f"{row['kernel']}", flush=True)  # fmt: skip
    if group.rank == 0:
        gpu = torch.cuda.get_device_name(device).replace(" ", "-")
        command = f"python -m tpserve.bench.kernel_times --model {model} --tp {tp}"
        kind = ""
        for option, value in (("quantization", quantization), ("kv_cache_dtype", kv_cache_dtype)):
            if value:
                command += f" --{option} {value}"
                kind += f"-{value}" if option == "quantization" else f"-kv_{value}"
        write_result(f"kernel_times-{gpu}-{model}-tp{tp}{kind}", command, {"steps": results})
    steps.network.close()
    gc.collect()
    if tp > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    fire.Fire(main)

"""Time of a decode step, without the engine: `python -m tpserve.bench.decode_step --model 7B --tp 1`.

Weights are random, at the real shapes, made on the device. Several ranks: `torchrun --nproc-per-node 4 -m
tpserve.bench.decode_step --model 70B --tp 4`. First a model of two layers is checked against float32; then whole steps
are timed at each batch and context. The floor is that of `roofline`, by the ceilings that this device is measured to
have before.
"""

from __future__ import annotations

import dataclasses
import os
import statistics

import fire
import torch
import torch.distributed as dist

from tpserve.bench import roofline
from tpserve.bench.record import write_result
from tpserve.model.args import ModelArgs
from tpserve.model.attention import PagedAttention
from tpserve.model.decoder import FusedDecoder
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama
from tpserve.model.parallel import TensorParallel, num_kv_heads, shard, without_multicast
from tpserve.model.quantized import quantize
from tpserve.model.rope import rope_table

MODELS = {
    "7B": ModelArgs(4096, 32, 32, 32, 32000, 11008),
    "13B": ModelArgs(5120, 40, 40, 40, 32000, 13824),
    "70B": ModelArgs(8192, 80, 64, 8, 32000, 28672),
    "8B": ModelArgs(4096, 32, 32, 8, 128256, 14336, rope_theta=500000.0),
}
_BLOCK_SIZE = 16
MAX_TOKENS = 256 * 768  # of the cache, which must fit beside the weights; larger pairs are left out


def main(
    model: str = "7B",
    tp: int = 1,
    batch: tuple[int, ...] | int = (1, 8),
    context: tuple[int, ...] | int = (128, 1024),
    layers: int = 0,
    check: bool = True,
    quantization: str = "",
    kv_cache_dtype: str = "",
) -> None:
    """Checks and times decode steps.

    Args:
        model: a key of `MODELS`.
        tp: ranks; those that torchrun started.
        batch, context: sequences and tokens of each; every pair is timed.
        layers: of the model; 0: all.
        check: compare two layers with float32 first.
        quantization: of the blocks' weights, one of `SCHEMES`; empty: none.
        kv_cache_dtype: "fp8", or empty.
    """
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    if tp > 1:
        without_multicast()
        dist.init_process_group("nccl", device_id=device)
    group = TensorParallel.from_world()
    if group.size != tp:
        raise SystemExit(f"--tp {tp} needs as many ranks: torchrun --nproc-per-node {tp} -m tpserve.bench.decode_step")
    batches, contexts = ((x,) if isinstance(x, int) else tuple(x) for x in (batch, context))
    figures: dict[str, float] = {}
    kind = "-".join(word for word in (quantization, kv_cache_dtype and "kv_" + kv_cache_dtype) if word)
    ceilings = roofline.measure(device, "bfloat16")
    if check:
        for n in batches:
            setup = Setup(model, group, device, layers=2, batch=n, context=200)
            fused, plain = setup.errors(n, 200)
            figures |= {f"error_2_layers_b{n}": round(fused, 5), f"error_2_layers_b{n}_plain": round(plain, 5)}
            del setup
    most = max(n * c for n in batches for c in contexts if n * c <= MAX_TOKENS)
    setup = Setup(
        model, group, device, layers=layers, batch=max(batches), context=max(contexts), tokens=most,
        quantization=quantization, kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    for n in batches:
        for c in contexts:
            if n * c > MAX_TOKENS:
                continue
            ms = setup.time_ms(n, c)
            name = f"b{n}_ctx{c}"
            work = roofline.decode(
                setup.args, tp, n, c, 2, block_bytes=roofline.BLOCK_BYTES[quantization],
                kv_bytes=1 if kv_cache_dtype else 2,
            )  # fmt: skip
            judged = roofline.judge(work, ceilings, ms)
            if group.rank == 0:
                print(f"{model} TP{tp} {kind} {roofline.line(name, judged)}", flush=True)
            figures |= {f"{name}_ms": round(ms, 3), f"{name}_of_floor": round(judged["share"], 3)}
    if group.rank == 0:
        gpu = torch.cuda.get_device_name(device).replace(" ", "-")
        lists = (",".join(map(str, values)) for values in (batches, contexts))
        start = "python" if tp == 1 else f"torchrun --nproc-per-node {tp}"
        flags = "--model {} --tp {} --batch {} --context {}".format(model, tp, *lists)
        if quantization:
            flags += f" --quantization {quantization}"
        if kv_cache_dtype:
            flags += f" --kv_cache_dtype {kv_cache_dtype}"
        command = f"{start} -m tpserve.bench.decode_step {flags}"
        write_result(f"decode_step-{gpu}-{model}-tp{tp}" + (f"-{kind}" if kind else ""), command, figures)
    setup.decoder.close()
    if tp > 1:
        dist.destroy_process_group()


class Setup:
    """A random model with a filled cache and its decoder.

    Args:
        model: a key of `MODELS`.
        group, device: of this rank.
        layers: 0: all.
        batch, context: the largest.
        tokens: that the cache holds; 0: batch · context.
        quantization: of the blocks' weights, one of `SCHEMES`; empty: none.
        kv_cache_dtype: "fp8", or empty.
    """

    def __init__(
        self,
        model: str,
        group: TensorParallel,
        device: torch.device,
        *,
        layers: int,
        batch: int,
        context: int,
        tokens: int = 0,
        quantization: str = "",
        kv_cache_dtype: str = "",
    ) -> None:
        args = dataclasses.replace(MODELS[model], n_layers=layers or MODELS[model].n_layers)
        self.group, self.device, self.args = group, device, args
        self.model = random_model(args, group, device, max_len=context)
        if quantization:
            quantize(self.model, quantization)
        blocks_each = -(-context // _BLOCK_SIZE)
        num_blocks = -(-(tokens or batch * context) // _BLOCK_SIZE) + batch
        self.cache = PagedKVCache(
            args.n_layers, num_blocks, _BLOCK_SIZE, num_kv_heads(args, group), args.head_dim,
            dtype=torch.float8_e4m3fn if kv_cache_dtype == "fp8" else torch.bfloat16, device=device,
        )  # fmt: skip
        for tensor in (*self.cache.k, *self.cache.v):
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.bfloat16, device=device))
        generator = torch.Generator().manual_seed(1)
        self.tokens_RL = torch.randint(args.vocab_size, (batch, context + 1), generator=generator).to(device)
        self._order = torch.randperm(num_blocks, generator=generator).to(device)
        self.tables_RB = torch.zeros(batch, blocks_each, dtype=torch.int64, device=device)
        self.decoder = FusedDecoder(self.model, self.cache, group, self.tokens_RL, self.tables_RB, max_num_seqs=batch)

    def _inputs(self, n: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and last positions of `n` sequences of `context` tokens, whose blocks are laid out anew."""
        blocks = -(-context // _BLOCK_SIZE)
        self.tables_RB[:n, :blocks] = self._order[: n * blocks].view(n, blocks)
        rows = torch.arange(n, device=self.device)
        return rows, torch.full_like(rows, context - 1)

    @torch.no_grad()
    def errors(self, n: int, context: int) -> tuple[float, float]:
        """Relative errors of the decoder's and the plain module's logits, against float32; spoils the model."""
        rows, positions = self._inputs(n, context)
        bucket = min(b for b in self.decoder.buckets if b >= n)
        self.decoder.capture(bucket)
        fused = self.decoder(rows, positions).clone()
        plain = self._plain(rows, positions, context)
        self.model.float()
        for i in range(self.args.n_layers):
            self.cache.k[i], self.cache.v[i] = self.cache.k[i].float(), self.cache.v[i].float()
        reference = self._plain(rows, positions, context)
        return tuple(float((x - reference).norm() / reference.norm()) for x in (fused, plain))  # type: ignore[return-value]

    def _plain(self, rows: torch.Tensor, positions: torch.Tensor, context: int) -> torch.Tensor:
        attend = PagedAttention(self.cache, self.tables_RB, rows, positions, [context] * len(rows), [])
        logits: torch.Tensor = self.model(self.tokens_RL[rows, positions], positions, attend)
        return logits

    def time_ms(self, n: int, context: int, repeats: int = 5, steps: int = 20) -> float:
        """Median over `repeats` of a step's mean time in milliseconds; of several ranks, the slowest one's."""
        rows, positions = self._inputs(n, context)
        self.decoder.capture(min(b for b in self.decoder.buckets if b >= n))
        times = []
        for repeat in range(repeats + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            if self.group.size > 1:
                dist.barrier()
            start.record()
            for _ in range(steps):
                self.decoder(rows, positions)
            end.record()
            end.synchronize()
            if repeat:  # the first warms up
                times.append(start.elapsed_time(end) / steps)
        slowest = torch.tensor(statistics.median(times), device=self.device)
        if self.group.size > 1:
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)


def random_model(args: ModelArgs, group: TensorParallel, device: torch.device, max_len: int) -> Llama:
    """This rank's part of a bfloat16 model with random weights; what ranks share is equal on them."""
    with torch.device("meta"):
        model = Llama(args, max_len).to(torch.bfloat16)
    shard(model, group)
    model.to_empty(device=device)
    model.rope_PC2 = rope_table(args, max_len, device)
    shared = torch.Generator(device).manual_seed(7)
    own = torch.Generator(device).manual_seed(100 + group.rank)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(1, 0.1, generator=shared)
        else:
            parameter.data.normal_(0, 0.02, generator=shared if name.startswith("tok") else own)
    return model.eval()


if __name__ == "__main__":
    fire.Fire(main)

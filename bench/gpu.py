"""Latency and throughput of the whole engine at a model's real shapes, beside a peer:
`python -m tpserve.bench.gpu --model 7B --tp 1 [--peer COMMAND]`.

Random bf16 weights, random prompts, greedy, no EOS; client, sockets, scheduler, paged cache and sampler are those that
serve. The method is the peer's: time to first token is the fastest of four runs of one token; a step is the difference
to the fastest of two runs of `new` tokens, divided by the steps between; throughput is all output tokens by the time
from the first submission to the last token. A floor is what the weights without the embedding, and the KV that a step
reads, take at the memory's measured bandwidth.

The peer's command is run after ours on the same machine, with the environment variable OUT naming a folder into which
it writes its rows as JSON lists [kind, batch, in, out, ttft_ms, step_ms, tokens_per_s, …].
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import fire
import torch

from tpserve.bench.convert_memory import write_result
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.protocol import RequestOutput
from tpserve.engine.sampling_params import SamplingParams
from tpserve.model.args import ModelArgs
from tpserve.model.checkpoint import CheckpointInfo

MODELS: dict[str, dict[str, Any]] = {
    "7B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": 32000},
    "13B": {"dim": 5120, "n_layers": 40, "n_heads": 40, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": 32000},
    "70B": {
        "dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3,
        "norm_eps": 1e-5, "vocab_size": 32000,
    },
    "110M": {"dim": 768, "n_layers": 12, "n_heads": 12, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": 32000},
    "tiny": {"dim": 256, "n_layers": 2, "n_heads": 4, "multiple_of": 64, "norm_eps": 1e-5, "vocab_size": 512},
}  # fmt: skip


class _Batch:
    """Requests that are submitted together and waited for."""

    def __init__(self, client: EngineClient, prompts: list[list[int]], new: int) -> None:
        self._left = len(prompts)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self.tokens = 0
        params = SamplingParams(max_new_tokens=new, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            client.submit(f"{id(self)}/{i}", prompt, params, self._take)

    def _take(self, output: RequestOutput) -> None:
        with self._lock:
            self.tokens += len(output.token_ids)
            if output.finish_reason is not None:
                assert output.finish_reason == "length", output
                self._left -= 1
                if not self._left:
                    self._done.set()

    def wait(self) -> None:
        """Until the last token."""
        assert self._done.wait(600), "timed out"


class Engine:
    """The engine under measurement.

    Args:
        model: a key of `MODELS`.
        tp: ranks.
        dtype: of weights and activations.
        options: further configuration.
    """

    def __init__(self, model: str, tp: int, dtype: str, **options: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tpserve-bench-")
        self.args = ModelArgs.from_params(MODELS[model])
        CheckpointInfo(self.args, "bfloat16").write(Path(self._folder.name))
        self._rng = random.Random(0)
        config = EngineConfig(
            checkpoint_dir=self._folder.name, load_format="dummy", tensor_parallel_size=tp, dtype=dtype,
            max_seq_len=2048, max_num_seqs=256, max_num_batched_tokens=8192, enable_prefix_caching=False, **options,
        )  # fmt: skip
        started_s = time.monotonic()
        self.client = EngineClient(config)
        self.info = self.client.start()
        self.run(1, 8, 1)
        self.start_s = time.monotonic() - started_s

    def run(self, n: int, prompt_tokens: int, new: int) -> float:
        """Seconds that `n` requests take together."""
        vocab = self.args.vocab_size
        prompts = [[self._rng.randrange(10, vocab - 10) for _ in range(prompt_tokens)] for _ in range(n)]
        started_s = time.perf_counter()
        batch = _Batch(self.client, prompts, new)
        batch.wait()
        elapsed_s = time.perf_counter() - started_s
        assert batch.tokens == n * new, "tokens are missing"
        return elapsed_s

    def close(self) -> None:
        """Ends the group."""
        self.client.close()
        self._folder.cleanup()


def latency(engine: Engine, batch: int, prompt_tokens: int, new: int) -> dict[str, Any]:
    """Time to first token and time of a decode step, in ms."""
    engine.run(batch, prompt_tokens, 16)
    first_s = min(engine.run(batch, prompt_tokens, 1) for _ in range(4))
    whole_s = min(engine.run(batch, prompt_tokens, new) for _ in range(2))
    step_ms = 1e3 * (whole_s - first_s) / (new - 1)
    return {"kind": "lat", "batch": batch, "in": prompt_tokens, "out": new, "ttft_ms": 1e3 * first_s,
            "step_ms": step_ms, "tokens_per_s": 1e3 * batch / step_ms}  # fmt: skip


def throughput(engine: Engine, requests: int, prompt_tokens: int, new: int) -> dict[str, Any]:
    """Output tokens a second of many requests at once."""
    engine.run(requests, prompt_tokens, 8)
    elapsed_s = engine.run(requests, prompt_tokens, new)
    return {"kind": "thr", "batch": requests, "in": prompt_tokens, "out": new, "ttft_ms": 0.0, "step_ms": 0.0,
            "tokens_per_s": requests * new / elapsed_s}  # fmt: skip


def floor_ms(args: ModelArgs, tp: int, batch: int, context: int, bandwidth: float, itemsize: int) -> float:
    """What a step's weights and KV take to read."""
    heads = args.n_heads + 2 * args.n_kv_heads
    layer = args.dim * (heads * args.head_dim + args.n_heads * args.head_dim + 3 * args.ffn_hidden_dim)
    weights = args.n_layers * layer + args.vocab_size * args.dim
    kv = 2 * args.n_layers * batch * context * args.n_kv_heads * args.head_dim
    return 1e3 * itemsize * (weights + kv) / tp / bandwidth


def main(
    model: str = "7B",
    tp: int = 1,
    batches: str = "1,8",
    prompts: str = "128,1024",
    requests: str = "64,256",
    new: int = 256,
    bandwidth: float = 4.24e12,
    dtype: str = "bfloat16",
    peer: str = "",
    **options: Any,
) -> None:
    """Measures and prints the table.

    Args:
        model: a key of `MODELS`.
        tp: ranks.
        batches, prompts: of the latency rows, comma-separated.
        requests: of the throughput rows (512 tokens in, 256 out).
        new: tokens of a latency run.
        bandwidth: of the device's memory, bytes a second.
        dtype: of weights and activations.
        peer: a command that measures the same of something else.
        options: keys of the engine's configuration.
    """
    numbers = [[int(x) for x in str(text).strip("()").split(",") if x.strip()] for text in (batches, prompts, requests)]
    engine = Engine(model, tp, dtype, **options)
    try:
        rows = [latency(engine, b, p, new) for b in numbers[0] for p in numbers[1]]
        rows += [throughput(engine, n, 512, 256) for n in numbers[2]]
    finally:
        engine.close()
    itemsize = getattr(torch, dtype).itemsize
    theirs = _peer_rows(peer) if peer else {}
    print(f"{'':4}{'batch':>6}{'in':>6}{'TTFT ms':>9}{'ms/step':>9}{'of floor':>9}{'tokens/s':>10}{'peer TTFT':>10}"
          f"{'peer step':>10}{'peer t/s':>10}")  # fmt: skip
    for row in rows:
        floor = floor_ms(engine.args, tp, row["batch"], row["in"] + new // 2, bandwidth, itemsize)
        row["floor_ms"] = floor if row["kind"] == "lat" else None
        peer_row = theirs.get((row["kind"], row["batch"], row["in"]))
        row["peer"] = peer_row
        beside = "".join(f"{x:>10.2f}" for x in peer_row[4:7]) if peer_row else ""
        share = f"{floor / row['step_ms']:>9.0%}" if row["step_ms"] else f"{'':9}"
        print(f"{row['kind']:4}{row['batch']:>6}{row['in']:>6}{row['ttft_ms']:>9.2f}{row['step_ms']:>9.3f}{share}"
              f"{row['tokens_per_s']:>10.0f}{beside}")  # fmt: skip
    command = f"python -m tpserve.bench.gpu {' '.join(sys.argv[1:])}".strip()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    figures = {"model": model, "tensor_parallel_size": tp, "dtype": dtype, "device": name, "start_s": engine.start_s}
    write_result(f"gpu_{model}_tp{tp}", command, {**figures, "options": options, "rows": rows})


def _peer_rows(command: str) -> dict[tuple[str, int, int], list[Any]]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, shell=True, env=os.environ | {"OUT": folder}, check=True)
        rows = [row for path in Path(folder).glob("*.json") for row in json.loads(path.read_text())]
    return {(row[0], row[1], row[2]): row for row in rows}


if __name__ == "__main__":
    fire.Fire(main)

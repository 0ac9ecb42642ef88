"""Latency and throughput of the whole engine, for `gpu`, `cpu` and `offline`: at a model's real shapes with random
weights, or of a checkpoint.

Random prompts, greedy unless asked otherwise, no EOS; client, sockets, scheduler, paged cache and sampler are those
that serve. The method is that of the peer's benchmark: time to first token is the fastest of four runs of one token; a
step is the difference to the fastest of two runs of `new` tokens, divided by the steps between; throughput is the
median over several runs of all output tokens by the time from the first submission to the last token. `roofline` says
what each could have taken.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tpserve.convert.describe import describe
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.in_flight import NewRequest
from tpserve.engine.options import split_options
from tpserve.engine.protocol import RequestOutput
from tpserve.engine.sampling_params import SamplingParams
from tpserve.model.args import ModelArgs
from tpserve.model.checkpoint import CheckpointInfo

_TOGETHER = 16  # requests: about what the first step has room for; checking all 256 before would keep it waiting
_CAPTURES_S = 4.0  # GPUs: graphs are captured behind the first requests; what is measured then is how it goes on

MODELS: dict[str, dict[str, Any]] = {
    "7B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": 32000},
    "13B": {"dim": 5120, "n_layers": 40, "n_heads": 40, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": 32000},
    "8B": {
        "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 1024, "ffn_dim_multiplier": 1.3,
        "norm_eps": 1e-5, "vocab_size": 128256, "rope_theta": 500000.0,
    },
    "70B": {
        "dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3,
        "norm_eps": 1e-5, "vocab_size": 32000,
    },
    "110M": {"dim": 768, "n_layers": 12, "n_heads": 12, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": 32000},
    "tiny": {"dim": 256, "n_layers": 2, "n_heads": 4, "multiple_of": 64, "norm_eps": 1e-5, "vocab_size": 512},
}  # fmt: skip


class _Batch:
    """Requests that are submitted together and waited for."""

    def __init__(self, client: EngineClient, prompts: list[list[int]], new: int, sampling: dict[str, Any]) -> None:
        self._left = len(prompts)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self.tokens = 0
        params = SamplingParams(max_new_tokens=new, ignore_eos=True, **sampling)
        requests = [NewRequest(f"{id(self)}/{i}", prompt, params, self._take) for i, prompt in enumerate(prompts)]
        for first in range(0, len(requests), _TOGETHER):
            client.submit_together(requests[first : first + _TOGETHER])

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
        model: a key of `MODELS`, or a checkpoint of any form.
        tp: ranks.
        dtype: of weights and activations.
        options: further configuration, over what is set here, and sampling fields.

    Attributes:
        args: the model's shape.
        start_s: from nothing to the first token.
    """

    def __init__(self, model: str, tp: int, dtype: str, **options: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tpserve-bench-")
        checkpoint, load_format = model, "auto"
        if model in MODELS:
            self.args = ModelArgs.from_params(MODELS[model])
            CheckpointInfo(self.args, "bfloat16").write(Path(self._folder.name))
            checkpoint, load_format = self._folder.name, "dummy"
        else:
            self.args = describe(Path(model)).args
        self._rng = random.Random(0)
        configured, self._sampling = split_options(options)
        settings = {
            "standby": False, "max_seq_len": 2048, "max_num_seqs": 256, "max_num_batched_tokens": 8192,
            "enable_prefix_caching": False, **configured,
        }  # fmt: skip
        config = EngineConfig(
            checkpoint_dir=checkpoint, load_format=load_format, tensor_parallel_size=tp, dtype=dtype, **settings
        )
        started_s = time.monotonic()
        self.client = EngineClient(config)
        self.info = self.client.start()
        self.run(1, 8, 1)
        self.start_s = time.monotonic() - started_s
        if self.info.device != "cpu":
            time.sleep(_CAPTURES_S)

    def run(self, n: int, prompt_tokens: int, new: int) -> float:
        """Seconds that `n` requests take together."""
        vocab = self.args.vocab_size
        prompts = [[self._rng.randrange(10, vocab - 10) for _ in range(prompt_tokens)] for _ in range(n)]
        started_s = time.perf_counter()
        batch = _Batch(self.client, prompts, new, self._sampling)
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


def throughput(engine: Engine, requests: int, prompt_tokens: int, new: int, runs: int = 3) -> dict[str, Any]:
    """Output tokens a second of many requests at once; "each": of every run."""
    engine.run(requests, prompt_tokens, 8)
    each = [requests * new / engine.run(requests, prompt_tokens, new) for _ in range(runs)]
    return {"kind": "thr", "batch": requests, "in": prompt_tokens, "out": new, "ttft_ms": 0.0, "step_ms": 0.0,
            "tokens_per_s": statistics.median(each), "each": each}  # fmt: skip

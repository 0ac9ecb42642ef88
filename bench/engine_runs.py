"""Latency and throughput of the whole engine, for `gpu`, `cpu` and `offline`: at a model's real shapes with random
weights, or of a checkpoint.

Random prompts, greedy unless asked otherwise, no EOS; client, sockets, scheduler, paged cache and sampler are those
that serve. Time to first token is the median of seven runs of one token; a step is the difference to the median of
three runs of `new` tokens, divided by the steps between; throughput is the median over several runs of all output
tokens by the time from the first submission to the last token. `roofline` says what each could have taken. The gap is
what the device waits between two steps, in the middle of the answers.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from tpserve.bench.roofline import BLOCK_BYTES
from tpserve.convert.describe import describe
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import EngineError
from tpserve.engine.in_flight import NewRequest
from tpserve.engine.options import split_options
from tpserve.engine.protocol import RankTrace, RequestOutput
from tpserve.engine.sampling_params import SamplingParams
from tpserve.model.args import ModelArgs
from tpserve.model.checkpoint import CheckpointInfo

_TOGETHER = 16  # requests: about what the first step has room for; checking all 256 before would keep it waiting
_FIRSTS, _WHOLES = 7, 3  # runs of one token, and of all
_WAIT_S = 600.0
_TRACED = 100  # steps, between which gaps are measured
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


_names = itertools.count()


class _Batch:
    """Requests that are submitted together and waited for."""

    def __init__(self, client: EngineClient, prompts: list[list[int]], new: int, sampling: dict[str, Any]) -> None:
        self._left = len(prompts)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self.tokens = 0
        params = SamplingParams(max_new_tokens=new, ignore_eos=True, **sampling)
        self._client = client
        name = next(_names)
        self._requests = [NewRequest(f"{name}/{i}", prompt, params, self._take) for i, prompt in enumerate(prompts)]
        for first in range(0, len(prompts), _TOGETHER):
            client.submit_together(self._requests[first : first + _TOGETHER])

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
        assert self._done.wait(_WAIT_S), "timed out"

    def cancel(self) -> None:
        """Nobody waits for the rest."""
        for request in self._requests:
            self._client.cancel(request.request_id)


class Engine:
    """The engine under measurement.

    Args:
        model: a key of `MODELS`, or a checkpoint of any form.
        tp: ranks.
        dtype: of weights and activations.
        options: further configuration, over what is set here, and sampling fields.

    Attributes:
        args: the model's shape.
        block_bytes: of a weight of its blocks; None: as many as of the others.
        start_s: from nothing to the first token.
    """

    def __init__(self, model: str, tp: int, dtype: str, **options: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tpserve-bench-")
        checkpoint, load_format = model, "auto"
        if model in MODELS:
            self.args = ModelArgs.from_params(MODELS[model])
            CheckpointInfo(self.args, "bfloat16").write(Path(self._folder.name))
            checkpoint, load_format = self._folder.name, "dummy"
            stored = None
        else:
            info = describe(Path(model))
            self.args, stored = info.args, info.quantization
        quantization = stored or str(options.get("quantization") or "")
        self.block_bytes = BLOCK_BYTES[quantization] if quantization else None
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
        prompts = self._prompts(n, prompt_tokens)
        started_s = time.perf_counter()
        batch = _Batch(self.client, prompts, new, self._sampling)
        batch.wait()
        elapsed_s = time.perf_counter() - started_s
        assert batch.tokens == n * new, "tokens are missing"
        return elapsed_s

    def gap(self, n: int, prompt_tokens: int, new: int, step_s: float) -> dict[str, float] | None:
        """What the device does nothing between one step's end and the next one's start while `n` requests are in the
        middle of their answers: "median", "p99", "longest" in µs, of the rank with the largest median, and "steps". At
        least so much: on CUDA a step starts where its first kernel is due, though the host may still be launching it.
        None: no trace of so many steps came, as where answers of `new` tokens end before.

        Args:
            n, prompt_tokens, new: of the requests.
            step_s: about what a step takes.
        """
        batch = _Batch(self.client, self._prompts(n, prompt_tokens), new, self._sampling)
        deadline_s = time.monotonic() + _WAIT_S
        while batch.tokens < n * new // 4:
            assert time.monotonic() < deadline_s, "timed out"
            time.sleep(1e-3)
        # On a CPU a stream alone gets several tokens a step.
        steps = max(2, min(_TRACED, new // (16 if self.info.device == "cpu" else 2)))
        try:
            traces = self.client.trace(steps, timeout_s=10.0 + 4 * steps * step_s)
        except EngineError:
            with contextlib.suppress(EngineError):
                self.client.trace(1)  # in the place of the one that goes on
            return None
        finally:
            batch.cancel()
        gaps = [gap for gap in map(_gap, traces) if gap]
        return max(gaps, key=lambda gap: gap["median"], default=None)

    def _prompts(self, n: int, length: int) -> list[list[int]]:
        vocab = self.args.vocab_size
        return [[self._rng.randrange(10, vocab - 10) for _ in range(length)] for _ in range(n)]

    def close(self) -> None:
        """Ends the group."""
        self.client.close()
        self._folder.cleanup()


def _gap(trace: RankTrace) -> dict[str, float] | None:
    steps = sorted((span.start_ns, span.duration_ns) for span in trace.spans if span.track == "device")
    gaps_us = [1e-3 * (b - a - length) for (a, length), (b, _) in itertools.pairwise(steps)]
    if not gaps_us:
        return None
    median, p99, longest = np.percentile(gaps_us, (50, 99, 100)).tolist()
    return {"median": median, "p99": p99, "longest": longest, "steps": len(steps)}


def latency(engine: Engine, batch: int, prompt_tokens: int, new: int) -> dict[str, Any]:
    """Time to first token and time of a decode step, in ms; "fastest": of the runs, as others report it."""
    engine.run(batch, prompt_tokens, 16)
    firsts_s = [engine.run(batch, prompt_tokens, 1) for _ in range(_FIRSTS)]
    wholes_s = [engine.run(batch, prompt_tokens, new) for _ in range(_WHOLES)]

    def figures(first_s: float, whole_s: float) -> dict[str, float]:
        return {"ttft_ms": 1e3 * first_s, "step_ms": 1e3 * (whole_s - first_s) / (new - 1)}

    typical = figures(statistics.median(firsts_s), statistics.median(wholes_s))
    return {"kind": "lat", "batch": batch, "in": prompt_tokens, "out": new, **typical,
            "tokens_per_s": 1e3 * batch / typical["step_ms"], "fastest": figures(min(firsts_s), min(wholes_s)),
            "gap_us": engine.gap(batch, prompt_tokens, new, 1e-3 * typical["step_ms"])}  # fmt: skip


def throughput(engine: Engine, requests: int, prompt_tokens: int, new: int, runs: int = 3) -> dict[str, Any]:
    """Output tokens a second of many requests at once; "each": of every run."""
    engine.run(requests, prompt_tokens, 8)
    each = [requests * new / engine.run(requests, prompt_tokens, new) for _ in range(runs)]
    return {"kind": "thr", "batch": requests, "in": prompt_tokens, "out": new, "ttft_ms": 0.0, "step_ms": 0.0,
            "tokens_per_s": statistics.median(each), "each": each,
            "gap_us": engine.gap(requests, prompt_tokens, new, requests / statistics.median(each))}  # fmt: skip

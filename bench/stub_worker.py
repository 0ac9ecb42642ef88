"""A rank whose network computes nothing: for measuring everything else (`engine_overhead`, `fronts`). Loads no weights.

The environment variable TPSERVE_STUB_STEP_MS is what a step takes at least, without work.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from tpserve.engine.config import EngineConfig
from tpserve.engine.core import CoreShape, EngineCore
from tpserve.engine.model_runner import ModelRunner
from tpserve.engine.worker import run
from tpserve.model.checkpoint import CheckpointInfo
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.logits import SamplingBatch
from tpserve.model.network import StepInputs
from tpserve.model.parallel import TensorParallel
from tpserve.model.sampling import argmax, sample


class StubNetwork:
    """Gives the same logits at every position; a `Network`.

    Args:
        vocab_size: V.
    """

    improvable = False
    lone_step_s = None
    drawn_N: torch.Tensor | None = None

    def __init__(self, vocab_size: int) -> None:
        self._logits_1V = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0))
        self._step_s = float(os.environ.get("TPSERVE_STUB_STEP_MS", "0")) / 1e3
        self._next_s = 0.0

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Logits [N, V] without copying them."""
        if self._step_s:
            now_s = time.monotonic()
            time.sleep(max(0.0, self._next_s - now_s))
            self._next_s = max(self._next_s, now_s) + self._step_s
        rows = inputs.rows_T if inputs.logits_rows_N is None else inputs.logits_rows_N
        return self._logits_1V.expand(len(rows), -1)

    def draw_greedy(self, logits_NV: torch.Tensor, rows_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Who reads what was drawn is not asked: it is written nowhere."""
        return argmax(logits_NV)

    def draw(self, logits_NV: torch.Tensor, batch: SamplingBatch, rows_N: torch.Tensor) -> torch.Tensor:
        """Likewise."""
        return sample(logits_NV, batch)

    def warm_up(self) -> None:
        """Nothing."""

    def improve(self, idle: bool) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def build(config: EngineConfig, device: torch.device, tp: TensorParallel) -> EngineCore:
    """An engine around the stub; as many KV blocks as all sequences can fill, without memory behind them."""
    torch.set_num_threads(1)
    vocab_size = CheckpointInfo.read(Path(config.checkpoint_dir)).args.vocab_size
    num_blocks = config.max_num_seqs * -(-config.max_seq_len // config.block_size)
    cache = PagedKVCache(0, num_blocks, config.block_size, 1, 1, dtype=torch.float32, device=device)
    network = StubNetwork(vocab_size)
    runner = ModelRunner(lambda _tokens, _tables: network, vocab_size, device, cache, config)
    return EngineCore(config, CoreShape(num_blocks, config.max_seq_len, (), vocab_size), runner, tp.rank)


if __name__ == "__main__":
    run(build)

"""How large the KV cache is on a device: what is left of its memory, beside the most that steps take."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.groups import with_
from tpserve.engine import group
from tpserve.engine.config import EngineConfig
from tpserve.engine.model_runner import ModelRunner
from tpserve.engine.step import StepPlan
from tpserve.model.loader import load_model
from tpserve.model.parallel import TensorParallel

GIB = 1 << 30
TOTAL, FREE, RESERVED, PEAK = 80 * GIB, 50 * GIB, 20 * GIB, 16 * GIB


@pytest.mark.parametrize(("changes", "prompts", "sampled", "scored"), [
    ({}, [64, 64, 64, 8], 8, 200),
    ({"max_num_batched_tokens": 65}, [64], 8, 65),  # a token alone is no prompt
    ({"max_num_batched_tokens": 40}, [40], 8, 40),
    ({"max_num_batched_tokens": 1, "max_num_seqs": 1}, [1], 1, 1),  # but there has to be one
    ({"max_num_seqs": 2, "max_num_batched_tokens": 600}, [64, 64], 2, 512),
    ({"num_speculative_tokens": 3}, [64, 64, 64, 8], 8 + 512, 200),
    ({"enable_chunked_prefill": False}, [64, 64, 64, 16], 8, 200),  # beside all that decode
    ({"enable_chunked_prefill": False, "num_speculative_tokens": 3}, [64] * 8, 8 + 512, 200),
])  # fmt: skip
def test_what_is_left_on_a_gpu(
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    prompts: list[int],
    sampled: int,
    scored: int,
) -> None:
    """The step that is run for it is as large as any: prompts of `max_num_batched_tokens` tokens."""
    usual = EngineConfig(
        checkpoint_dir=str(tiny_checkpoint), device="cpu", max_seq_len=64, max_num_seqs=8, max_num_batched_tokens=200,
        gpu_memory_utilization=0.5,
    )  # fmt: skip
    config = with_(usual, **changes)
    loaded = load_model(tiny_checkpoint, tp=TensorParallel(), dtype=torch.float32, max_seq_len=64)
    plans: list[StepPlan] = []
    launch = ModelRunner.launch

    def noting(runner: ModelRunner, plan: StepPlan, timed: bool = False) -> Any:
        plans.append(plan)
        return launch(runner, plan, timed)

    monkeypatch.setattr(ModelRunner, "launch", noting)
    for name, value in (
        ("reset_peak_memory_stats", None), ("synchronize", None), ("empty_cache", None), ("memory_reserved", RESERVED),
        ("max_memory_allocated", PEAK), ("mem_get_info", (FREE, TOTAL)),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    made: list[weakref.ref[ModelRunner]] = []
    init = ModelRunner.__init__

    def counting(runner: ModelRunner, *args: Any, **more: Any) -> None:
        init(runner, *args, **more)
        made.append(weakref.ref(runner))

    monkeypatch.setattr(ModelRunner, "__init__", counting)
    gc.disable()  # as at a rank's start
    try:
        left = group._free_cuda_bytes(config, loaded)
        assert [runner() for runner in made] == [None], "what it has joined would stay beside the next one's"
    finally:
        gc.enable()
    assert [[entry.num_query_tokens for entry in plan.entries] for plan in plans] == [prompts]
    foreign = TOTAL - FREE - RESERVED
    assert left == TOTAL // 2 - foreign - PEAK - 4 * (8 * sampled + 3 * scored) * loaded.info.args.vocab_size

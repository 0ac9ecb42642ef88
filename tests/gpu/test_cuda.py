"""The same engine on CUDA over NCCL says what it says on the CPU over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.requests import Collected
from tests.helpers.shards import TINY_PARAMS, write_fairscale_checkpoint
from tpserve.convert.convert import convert
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.process import is_running

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]
PARAMS = TINY_PARAMS | {"dim": 256, "n_heads": 4, "n_kv_heads": 2, "n_layers": 4, "vocab_size": 500}
PROMPTS = [[3 + (7 * i + j * j) % 490 for j in range(1 + 9 * i)] for i in range(12)]
# Every kind of work that the sampler has, spread over the batch.
CONTROLS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"logit_bias": {7: 3.0, 9: -100.0}},
    {"bad_words": ((5,), (6, 7), (8, 9, 10))},
    {"min_tokens": 10, "stop_token_ids": (3, 4, 5)},
    {"top_p": 0.9},
    {"top_k": 20, "top_p": 0.8},
    {"min_p": 0.05},
    {"top_p": 0.95, "top_p_decay": 0.9, "top_p_min": 0.3, "top_p_reset_ids": (11, 12)},
    {"repetition_penalty": 0.8, "top_k": 50},
    {},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    write_fairscale_checkpoint(folder / "in", PARAMS, mp=2, seed=5)
    return convert(folder / "in", folder / "out", progress=False)


def answers(
    checkpoint: Path, device: str, tp: int, dtype: str, temperature: float, **how: Any
) -> tuple[list[list[int]], list[list[float]]]:
    config = EngineConfig(
        checkpoint_dir=str(checkpoint),
        device=device,
        tensor_parallel_size=tp,
        dtype=dtype,
        max_seq_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        standby=False,
        **how,
    )
    client = EngineClient(config)
    try:
        info = client.start()
        assert info.device.startswith(device)
        pids = client.pids
        streams = [
            Collected(
                client,
                p,
                max_new_tokens=40,
                ignore_eos=True,
                temperature=temperature,
                seed=i,
                logprobs=0,
                **CONTROLS[i],
            )
            for i, p in enumerate(PROMPTS)
        ]
        ids = [stream.wait() for stream in streams]
        assert [rank.num_blocks_in_use for rank in client.status().ranks] == [0] * tp
    finally:
        client.close()
    assert not [pid for pid in pids if is_running(pid)]
    return ids, [stream.logprobs for stream in streams]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_float32_tokens_equal_the_cpus(checkpoint: Path, tp: int, temperature: float) -> None:
    if torch.cuda.device_count() < tp:
        pytest.skip(f"{tp} GPUs needed, {torch.cuda.device_count()} here")
    expected, logprobs = answers(checkpoint, "cpu", 1, "float32", temperature)
    got, got_logprobs = answers(checkpoint, "cuda", tp, "float32", temperature)
    assert got == expected
    for a, b in zip(logprobs, got_logprobs, strict=True):
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 2e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(checkpoint: Path, dtype: str) -> None:
    tp = min(2, torch.cuda.device_count())
    _, exact = answers(checkpoint, "cpu", 1, "float32", 0.0)
    _, half = answers(checkpoint, "cuda", tp, dtype, 0.0)
    # Later tokens may differ, and with them everything after; the first ones' probabilities must agree.
    for a, b in zip(exact, half, strict=True):
        assert abs(a[0] - b[0]) < 0.1


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_bfloat16_tokens_are_the_same_with_graphs_before_them_and_without(checkpoint: Path, tp: int) -> None:
    """One stream at a time: which streams share a step depends on when they come, and so do a sum's last bits."""
    if torch.cuda.device_count() < tp:
        pytest.skip(f"{tp} GPUs needed, {torch.cuda.device_count()} here")

    def alone(**how: Any) -> list[tuple[list[int], list[float]]]:
        config = EngineConfig(
            checkpoint_dir=str(checkpoint), device="cuda", tensor_parallel_size=tp, dtype="bfloat16", max_seq_len=512,
            max_num_seqs=16, enable_prefix_caching=False, standby=False, **how,
        )  # fmt: skip
        client = EngineClient(config)
        try:
            client.start()
            streams = []
            for prompt in PROMPTS + PROMPTS:  # the first run before their graphs are there
                stream = Collected(client, prompt, max_new_tokens=40, ignore_eos=True, temperature=0.0, logprobs=0)
                streams.append((stream.wait(), stream.logprobs))
            return streams
        finally:
            client.close()

    with_graphs = alone()
    assert with_graphs[: len(PROMPTS)] == with_graphs[len(PROMPTS) :]
    assert with_graphs == alone(cuda_graphs=False)


@pytest.mark.parametrize("how", [{"async_scheduling": False}, {"num_speculative_tokens": 4}, {"num_kv_blocks": 40}])
def test_planning_ahead_drafts_and_preemption_change_no_token(checkpoint: Path, how: dict[str, Any]) -> None:
    assert answers(checkpoint, "cuda", 1, "float32", 0.8, **how)[0] == answers(checkpoint, "cuda", 1, "float32", 0.8)[0]


def test_beams_equal_the_cpus(checkpoint: Path) -> None:
    def beams(device: str) -> list[list[int]]:
        client = EngineClient(EngineConfig(checkpoint_dir=str(checkpoint), device=device, dtype="float32"))
        try:
            client.start()
            return [Collected(client, p, max_new_tokens=20, beam_width=4).wait() for p in PROMPTS[:4]]
        finally:
            client.close()

    assert beams("cuda") == beams("cpu")

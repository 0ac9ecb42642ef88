"""The engine under everything that users ask for at a time, at real widths: nobody is refused or left waiting, no rank
dies, no block stays in use, nothing is compiled while serving, and memory is what was granted."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.conftest import SEED
from tests.helpers.requests import Collected
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.process import is_running
from tpserve.model.args import ModelArgs
from tpserve.model.checkpoint import CheckpointInfo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]
# Llama 3's 8B, of fewer layers: as large a vocabulary as there is, shared key/value heads.
ARGS = ModelArgs(4096, 8, 32, 8, 128256, 14336, rope_theta=500000.0)
REQUESTS, PAUSE_S = 150, 0.03
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.0, "top_k": 2000, "seed": 5},  # more than the kernels' own
    {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    {"temperature": 0.9, "n": 3, "best_of": 4},
    {"temperature": 0.0, "logprobs": 5, "logit_bias": {7: 2.0}, "bad_words": ((5,), (6, 7))},
    {"temperature": 0.0, "prompt_logprobs": 2},
    {"temperature": 0.0, "beam_width": 4, "n": 2},
    {"temperature": 1.0, "top_p": 0.95, "top_p_decay": 0.9, "min_tokens": 3, "stop_token_ids": (3, 4)},
]
CONFIGS: dict[str, dict[str, Any]] = {
    "few blocks": {"num_kv_blocks": 1500},  # sequences are preempted
    "fp8": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
    "int4, drafts": {"quantization": "int4", "num_speculative_tokens": 4},
    "whole prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192, "block_size": 32},
    "float16": {"dtype": "float16", "enable_prefix_caching": False},
    "long": {"max_seq_len": 65536, "max_num_batched_tokens": 8192},
}


def load(client: EngineClient, longest: int) -> list[tuple[Collected, int, bool]]:
    """Requests of all kinds, one after another, with the tokens that each may have; some are cancelled."""
    rng, sent = random.Random(SEED), []
    for i in range(REQUESTS):
        tokens = int(2 ** rng.uniform(0, 12)) if i % 40 else longest - 200
        few = i % len(KINDS) in (7, 8)  # log-probabilities of a whole prompt, beams
        prompt = [rng.randrange(10, 128000) for _ in range(min(tokens, 1000) if few else tokens)]
        if i % 5 == 0:  # the text says something again, so there is something to guess
            prompt = (prompt[:20] * (len(prompt) // 20 + 1))[: len(prompt)]
        new = rng.randint(1, 120)
        params = KINDS[i % len(KINDS)]
        new = max(new, params.get("min_tokens", 0))
        request = Collected(client, prompt, max_new_tokens=new, ignore_eos=True, **params)
        cancelled = rng.random() < 0.15
        sent.append((request, new, cancelled))
        if cancelled:
            time.sleep(rng.uniform(0, 0.1))
            client.cancel(request.request_id)
        time.sleep(rng.expovariate(1 / PAUSE_S))
    return sent


@pytest.mark.parametrize("name", CONFIGS)
def test_all_kinds_of_requests_together(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, kernels = tmp_path / "model", tmp_path / "kernels"
    folder.mkdir()
    CheckpointInfo(ARGS, "bfloat16").write(folder)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(kernels))
    config = EngineConfig(
        checkpoint_dir=str(folder), load_format="dummy", device="cuda", standby=False, self_test=False,
        **{"dtype": "bfloat16", "max_seq_len": 8192, "max_num_seqs": 128, "max_num_batched_tokens": 2048,
           "gpu_memory_utilization": 0.6, **CONFIGS[name]},
    )  # fmt: skip
    client = EngineClient(config)
    try:
        client.start()
        pids, compiled = client.pids, _variants(kernels)
        sent = load(client, config.max_seq_len)
        for request, new, cancelled in sent:
            if not cancelled:  # of those that are, nothing more is heard
                request.wait(120)
                assert request.error is None
                reasons = set(request.finish_reasons.values())
                assert reasons <= {"length", "stop"}
                if reasons == {"length"}:
                    assert {len(answer) for answer in request.answers.values()} == {new}
            assert all(len(answer) <= new for answer in request.answers.values())
        assert client.pids == pids
        assert [rank.num_blocks_in_use for rank in client.status().ranks] == [0]
        free, total = torch.cuda.mem_get_info()
        assert (total - free) / total < config.gpu_memory_utilization + 0.05
        assert _variants(kernels) == compiled, "compiled while serving"
    finally:
        client.close()
    assert not [pid for pid in pids if is_running(pid)]


def _variants(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.cubin")}

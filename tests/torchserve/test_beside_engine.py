"""What TorchServe answers is what the engine gives to whoever calls it in its own process, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.requests import Collected
from tests.text.models import load, tiny_model
from tests.torchserve.server import Server
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig

pytestmark = pytest.mark.slow

PROMPTS = ["once upon a time", "the cat and a dog", "one two three", "four five six seven eight nine ten there was"]
WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.9, "seed": 11},
    {"temperature": 1.2, "seed": 12, "top_p": 0.8, "top_k": 40},
]
TOKENS = 40


@pytest.fixture(scope="module")
def client(tiny_checkpoint: Path) -> Iterator[EngineClient]:
    config = EngineConfig(
        checkpoint_dir=str(tiny_checkpoint), device="cpu", dtype="float32", tensor_parallel_size=2, standby=False,
        max_seq_len=128, max_num_seqs=16,
    )  # fmt: skip
    client = EngineClient(config)
    try:
        client.start()
        yield client
    finally:
        client.close()


def test_torchserve_and_the_engine_give_the_same_tokens(server: Server, client: EngineClient) -> None:
    tokenizer = load(tiny_model())
    asked = [(prompt, way) for prompt in PROMPTS for way in WAYS]

    def serve(prompt: str, way: dict[str, Any]) -> list[int]:
        answer = server.post({"prompt": prompt, "max_new_tokens": TOKENS, "ignore_eos": True, "stream": False, **way})
        assert answer.status == 200, answer.body
        ids: list[int] = answer.json["ids"]
        return ids

    with ThreadPoolExecutor(len(asked)) as pool:
        served = list(pool.map(serve, *zip(*asked, strict=True)))
    streams = [
        Collected(
            client, tokenizer.encode(prompt, bos=True, eos=False), max_new_tokens=TOKENS, ignore_eos=True, **way
        )
        for prompt, way in asked
    ]  # fmt: skip
    here = [stream.wait() for stream in streams]
    assert served == here
    assert all(len(ids) == TOKENS for ids in here)
    assert len({tuple(ids) for ids in here}) > len(PROMPTS), "all ways of drawing are alike: nothing was compared"

"""The old example's model-config.yaml, where TorchServe's own torchrun starts one backend a rank."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.torchserve.conftest import running
from tests.torchserve.server import Server, lives
from tpserve.handler.archive import archive

OLD: dict[str, Any] = {
    "minWorkers": 1,
    "maxWorkers": 1,
    "maxBatchDelay": 200,
    "responseTimeout": 300,
    "parallelType": "tp",
    "deviceType": "cpu",
    "torchrun": {"nproc-per-node": 2},
    "handler": {
        "converted_ckpt_dir": "converted_checkpoints",
        "tokenizer_path": "tokenizer.model",
        "model_args_path": "model_args.json",
        "max_seq_len": 512,
        "max_batch_size": 6,
        "max_new_tokens": 50,
        "temperature": 0.6,
        "top_p": 0.9,
        "manual_seed": 40,
        "mode": "chat",
    },
}
PROMPT = {"prompt": "Hey, are you conscious? Can you talk to me?", "max_new_tokens": 50}
DIALOG = {"dialog": [{"role": "user", "content": "what is the recipe of mayonnaise?"}], "mode": "chat"}


@pytest.fixture(scope="module")
def old(folder: Path, tiny_checkpoint: Path) -> Iterator[Server]:
    """Two models: the file as it was, and with continuous batching."""
    streaming = {**OLD, "batchSize": 8, "continuousBatching": True}
    streaming["handler"] = {**OLD["handler"], "max_new_tokens": 200}
    for name, content in {"old": {**OLD, "batchSize": 4}, "old_streaming": streaming}.items():
        content["handler"] = {**content["handler"], "standby": False}  # the ranks are counted below
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(content))
        archive(
            tiny_checkpoint, config=config, model_name=name, export_path=folder / "old", archive_format="no-archive"
        )
    yield from running(Server(folder / "old", ["old", "old_streaming"]), clean_log=False)


def put(old: Server, body: Any) -> Any:
    with old.request("PUT", "", json.dumps(body).encode()) as response:  # curl -T
        return json.loads(response.read())


def test_the_example_requests_are_answered_whole(old: Server) -> None:
    answer = put(old, PROMPT)
    assert answer["finish_reason"] in ("stop", "length")
    assert put(old, PROMPT)["ids"] == answer["ids"]  # manual_seed
    assert put(old, DIALOG)["usage"]["completion_tokens"] <= 50
    raw = old.post([DIALOG["dialog"]])
    assert raw.json[0]["generation"]["role"] == "assistant"


def test_a_bad_request_in_the_batch_is_its_own_400(old: Server) -> None:
    good = put(old, PROMPT)
    bodies = [PROMPT, {"prompt": "x", "top_p": 0}, PROMPT, b"{"]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(old.post, bodies))
    assert [answer.status for answer in answers] == [200, 400, 200, 400]
    assert answers[0].json == answers[2].json == good


def test_with_continuous_batching_it_streams(old: Server) -> None:
    answer = old.post(PROMPT, model="old_streaming")
    ids = [i for line in answer.lines for i in line["ids"]]
    assert (len(answer.lines) > 1, ids) == (True, put(old, PROMPT)["ids"])
    assert old.blocks_in_use("old_streaming") == [0, 0]


def test_a_rank_that_dies_costs_a_stream_a_pause(old: Server) -> None:
    body = {**PROMPT, "ignore_eos": True, "max_new_tokens": 200}
    alone = old.post(body, model="old_streaming").lines
    with old.request("POST", "", json.dumps(body).encode(), "application/json", "old_streaming") as response:
        lines = [json.loads(response.readline())]
        # torchrun starts a rank with `python -u -m`.
        ranks = [p for p in old.processes() if "tpserve.engine.worker" in p.cmdline() and p.cmdline()[1] == "-u"]
        assert len(ranks) == 4
        for rank in ranks[::2]:  # one of each model
            rank.kill()
        lines += [json.loads(line) for line in response]
    assert len(lines[0]["ids"]) < 100  # it was killed in the middle
    assert [i for line in lines for i in line["ids"]] == [i for line in alone for i in line["ids"]]
    assert lines[-1]["usage"] == alone[-1]["usage"]


def test_when_torchserve_is_killed_nothing_outlives_it(old: Server) -> None:
    """Last in this file: the server does not come back."""
    # Per model torchrun, two backends, our launcher and its two ranks; one that has just died is replaced.
    deadline_s = time.monotonic() + 30
    while len(below := old.processes()[1:]) < 1 + 2 * 6:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    (java,) = (process for process in below if process.name() == "java")
    java.kill()
    _, alive = psutil.wait_procs(below, timeout=15)
    assert not [process for process in alive if lives(process)]

"""A real TorchServe with a real engine at TP 2: every form, every refusal, many streams at once."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.text.models import load, tiny_model
from tests.torchserve.server import Answer, Server, encoded

PROMPT = "once upon a time there was the cat"
LONG = {"prompt": PROMPT, "max_new_tokens": 200, "ignore_eos": True}
USER = {"role": "user", "content": "one two three"}


@pytest.fixture(autouse=True)
def _nothing_is_left_in_the_cache(server: Server) -> Any:
    yield
    assert server.blocks_in_use() == [0, 0]


def whole(answer: Answer) -> tuple[str, list[int]]:
    """Text and ids of a streamed answer."""
    assert answer.status == 200, answer.body
    lines = answer.lines
    assert all("finish_reason" not in line for line in lines[:-1])
    assert lines[-1]["finish_reason"] in ("stop", "length")
    text, ids = "".join(line["text"] for line in lines), [i for line in lines for i in line["ids"]]
    assert lines[-1]["usage"]["completion_tokens"] == len(ids)
    return text, ids


def test_a_stream_is_told_line_by_line_while_it_runs(server: Server) -> None:
    arrivals: list[float] = []
    with server.request("POST", "", encoded(LONG), "application/json") as response:
        assert response.headers["Content-Type"] == "application/x-ndjson"
        lines = []
        while line := response.readline():
            lines.append(json.loads(line))
            arrivals.append(time.monotonic())
    assert len(lines) > 20
    assert arrivals[-1] - arrivals[0] > 0.1
    assert sum(len(line["ids"]) for line in lines) == LONG["max_new_tokens"]


def test_one_object_and_a_stream_say_the_same(server: Server) -> None:
    body = {"prompt": PROMPT, "max_new_tokens": 30, "logprobs": True, "temperature": 0.9, "seed": 7}
    stream, single = server.post(body), server.post({**body, "stream": False})
    assert single.headers["content-type"] == "application/json"
    assert whole(stream) == (single.json["text"], single.json["ids"])
    tokenizer = load(tiny_model())
    assert single.json["text"] == tokenizer.decode([i for i in single.json["ids"] if i < tokenizer.vocab_size])
    assert len(single.json["logprobs"]) == len(single.json["ids"])
    assert single.json["usage"] == stream.lines[-1]["usage"]


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_answers(server: Server, length: int) -> None:
    _, ids = whole(server.post({"prompt": PROMPT, "max_new_tokens": length}))
    assert len(ids) == length


def test_the_forms_of_the_old_example(server: Server) -> None:
    with server.request("PUT", "", encoded({"prompt": PROMPT, "max_new_tokens": 8})) as response:  # curl -T
        assert json.loads(response.read().splitlines()[-1])["finish_reason"] == "length"
    dialog = {"dialog": [{"role": "system", "content": "be brief"}, USER], "max_new_tokens": 8, "mode": "chat"}
    whole(server.post(dialog))
    raw = server.post(b"once upon a time", content_type="text/plain")
    assert list(raw.json[0]) == ["generation"]
    chats = server.post([[USER], [USER, {"role": "assistant", "content": "four"}, USER]], content_type=None)
    assert [list(chat["generation"]) for chat in chats.json] == [["role", "content"]] * 2


REFUSED: list[tuple[str, Any, int, str | None]] = [
    ("malformed JSON", b'{"prompt": "x"', 400, None),
    ("invalid UTF-8", b"\xff\xfeprompt", 400, None),
    ("missing prompt", {"max_new_tokens": 3}, 400, "prompt"),
    ("a prompt longer than the context", {"prompt": "one two three " * 400}, 400, "prompt"),
    ("a prompt of megabytes", {"prompt": "x" * 2_000_000}, 400, "prompt"),
    ("no tokens", {"prompt": "x", "max_new_tokens": 0}, 400, "max_new_tokens"),
    ("negative temperature", {"prompt": "x", "temperature": -1}, 400, "temperature"),
    ("NaN temperature", b'{"prompt": "x", "temperature": NaN}', 400, None),
    ("wrong role order", {"dialog": [USER, USER]}, 400, "dialog"),
    ("special tags", {"dialog": [{"role": "user", "content": "x [/INST]"}]}, 400, "dialog"),
    ("unknown field", {"prompt": "x", "temprature": 1}, 400, "temprature"),
    ("an id outside the vocabulary", {"prompt_token_ids": [1, 99999]}, 400, "prompt_token_ids"),
    ("a form", b"prompt=x", 400, "prompt"),
    ("10 MB", b"a" * 10_000_000, 413, None),
]


def test_refusals_beside_a_stream_that_never_notices(server: Server) -> None:
    alone = whole(server.post(LONG))
    with ThreadPoolExecutor() as pool:
        for batch in (REFUSED[:7], REFUSED[7:]):
            neighbour = pool.submit(server.post, LONG)
            for name, body, status, field in batch:
                content_type = "application/x-www-form-urlencoded" if name == "a form" else "application/json"
                answer = server.post(body, content_type)
                assert answer.status == status, (name, answer.body)
                if status == 400:
                    error = answer.json["error"]
                    assert (error["field"], error["code"]) == (field, 400), name
                    assert error["message"]
            assert whole(neighbour.result()) == alone


def test_32_streams_at_once_equal_their_solo_runs(server: Server) -> None:
    bodies = [
        {
            "prompt": " ".join(PROMPT.split()[: 1 + i % 8]),
            "max_new_tokens": 4 + (i * 7) % 20,
            "temperature": 0.0 if i % 4 == 0 else 0.8 + 0.1 * (i % 3),
            "top_p": 0.95 if i % 2 else 1.0,
            "top_k": 20 if i % 5 == 0 else 0,
            "seed": i,
            "ignore_eos": i % 3 == 0,
        }
        for i in range(32)
    ]
    with ThreadPoolExecutor(32) as pool:
        together = [whole(answer) for answer in pool.map(server.post, bodies)]
    assert server.blocks_in_use() == [0, 0]
    solo = [whole(server.post(body)) for body in bodies]
    assert together == solo


def test_a_client_that_goes_away_frees_its_blocks(server: Server) -> None:
    alone = whole(server.post(LONG))
    with ThreadPoolExecutor() as pool:
        neighbour: Future[Answer] = pool.submit(server.post, LONG)
        with server.request("POST", "", encoded(LONG), "application/json") as response:
            response.readline()
        assert whole(neighbour.result()) == alone
    assert "has gone" in server.log.read_text()


def test_too_many_requests_are_told_to_come_back(server: Server) -> None:
    body = {"prompt": PROMPT, "max_new_tokens": 60, "ignore_eos": True, "stream": False}
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(server.post, [body] * 60))
    assert {answer.status for answer in answers} == {200, 429}
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in answers if answer.status == 429)
    assert len({answer.body for answer in answers if answer.status == 200}) == 1


def test_two_answers_of_one_request(server: Server) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1.0, "seed": 1, "n": 2, "ignore_eos": True}
    lines = server.post(body).lines
    single = server.post({**body, "stream": False}).json
    for index, choice in enumerate(single["choices"]):
        of_answer = [line for line in lines if line["index"] == index]
        assert [i for line in of_answer for i in line["ids"]] == choice["ids"]
        assert "".join(line["text"] for line in of_answer) == choice["text"]
        assert of_answer[-1]["finish_reason"] == choice["finish_reason"] == "length"
    assert lines[-1]["usage"] == single["usage"]
    assert single["usage"]["completion_tokens"] == 24


def test_the_end_that_a_stop_string_makes(server: Server) -> None:
    plain = server.post({**LONG, "stream": False}).json
    stop = plain["text"][40:44]
    stopped = server.post({**LONG, "stop": stop})
    assert "".join(line["text"] for line in stopped.lines) == plain["text"][: plain["text"].find(stop)]
    assert stopped.lines[-1]["finish_reason"] == "stop"


def test_a_deadline(server: Server) -> None:
    answer = server.post({**LONG, "max_new_tokens": 240, "timeout_s": 0.1, "stream": False})
    assert (answer.status, answer.json["finish_reason"]) == (200, "timeout")
    assert len(answer.json["ids"]) < 240


def test_metrics_and_a_trace(server: Server) -> None:
    with ThreadPoolExecutor() as pool:
        running = pool.submit(server.post, LONG)
        trace = server.get("1.0/trace/20")
        whole(running.result())
    spans = [event for event in trace.json["traceEvents"] if event["ph"] == "X"]
    assert {span["pid"] for span in spans} == {0, 1}
    metrics = server.get("1.0/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b"tpserve:time_to_first_token_seconds_count" in metrics.body
    assert server.get("1.0/trace/none").status == 400


def test_health_and_unknown_paths(server: Server) -> None:
    health = server.get("1.0/health")
    assert (health.status, health.json["status"], health.json["tensor_parallel_size"]) == (200, "ready", 2)
    assert server.get("1.0/v9/nothing").status == 404

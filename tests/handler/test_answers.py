"""What clients see of several answers, stop strings, deadlines, metrics and traces."""

from __future__ import annotations

import json

import pytest

from tests.handler.fakes import FakeEngine, body
from tests.handler.frontend import HELLO, Frontend, ids_of
from tpserve.engine.protocol import PromptLogprob


def test_two_answers_stream_side_by_side(engine: FakeEngine, frontend: Frontend) -> None:
    frontend.call({"a": body(HELLO | {"n": 2, "priority": 3, "timeout_s": 9})})
    assert engine.urgency["a/0"] == (3, 9.0)
    engine.say("a/0", ids_of("the cat"), index=1, prompt_logprobs=[None, PromptLogprob(-1.0, [])])
    frontend.call()
    engine.say("a/0", ids_of("dog"), "stop")
    frontend.call()
    engine.say("a/0", [], "length", index=1)
    frontend.call()
    first, second, third = frontend.lines("a")
    assert first == {"index": 1, "text": "the cat", "ids": ids_of("the cat"), "prompt_logprobs": [None, -1.0]}
    assert second == {"index": 0, "text": "dog", "ids": ids_of("dog"), "finish_reason": "stop"}
    assert (third["index"], third["finish_reason"]) == (1, "length")
    assert third["usage"]["completion_tokens"] == len(ids_of("the cat") + ids_of("dog"))
    assert frontend.open == []


def test_two_answers_as_one_object(engine: FakeEngine, frontend: Frontend) -> None:
    frontend.call({"a": body(HELLO | {"n": 2, "stream": False, "logprobs": 1, "cum_log_probs": True})})
    for index, word in enumerate(["dog", "cat"]):
        ids = ids_of(word)
        top = [[(i, -0.5)] for i in ids]
        engine.say("a/0", ids, "stop", index=index, logprobs=[-0.5] * len(ids), top_logprobs=top)
    frontend.call()
    reply = json.loads(frontend.bodies["a"])
    assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == [(0, "dog"), (1, "cat")]
    assert reply["choices"][1]["top_logprobs"] == [[[i, -0.5]] for i in ids_of("cat")]
    assert reply["choices"][1]["cumulative_logprob"] == -0.5 * len(ids_of("cat"))
    assert set(reply) == {"choices", "usage"}


def test_the_best_of_three_is_delivered_once(engine: FakeEngine, frontend: Frontend) -> None:
    frontend.call({"a": body(HELLO | {"best_of": 3})})
    assert engine.submitted["a/0"][1].logprobs == 0
    for index, word in enumerate(["dog", "cat", "the"]):
        frontend.call()
        assert "a" not in frontend.bodies
        ids = ids_of(word)
        engine.say("a/0", ids, "stop", index=index, logprobs=[-abs(index - 1.0)] * len(ids))
    frontend.call()
    (line,) = frontend.lines("a")
    assert (line["text"], set(line)) == ("cat", {"text", "ids", "finish_reason", "usage"})
    assert "a" not in frontend.chunked


def test_a_stop_string_ends_an_answer_here_and_in_the_engine(engine: FakeEngine, frontend: Frontend) -> None:
    frontend.call({"a": body(HELLO | {"stop": ["cat and"], "echo": True})})
    for i in ids_of("the cat and a dog"):
        if "a/0" in engine.submitted:
            engine.say("a/0", [i])
            frontend.call()
    lines = frontend.lines("a")
    assert "".join(line["text"] for line in lines) == "once upon a time the "
    assert lines[-1]["finish_reason"] == "stop"
    assert (engine.cancelled_answers, frontend.open) == ([("a/0", 0)], [])


def test_a_timeout_is_an_end_and_no_error(engine: FakeEngine, frontend: Frontend) -> None:
    frontend.call({"a": body(HELLO | {"timeout_s": 1}), "b": body(HELLO | {"timeout_s": 1, "stream": False})})
    for name in ("a/0", "b/0"):
        engine.say(name, [], "timeout")
    frontend.call()
    for name in "ab":
        assert (frontend.status[name], frontend.lines(name)[0]["finish_reason"]) == (200, "timeout")


def test_metrics(engine: FakeEngine, frontend: Frontend) -> None:
    context = frontend.call({"a": body(b"", "", "metrics")})
    assert context.content_type[0].startswith("text/plain; version=0.0.4")
    assert b"tpserve:num_requests_running 0.0\n" in frontend.bodies["a"]


@pytest.mark.parametrize(("path", "steps"), [("trace", 100), ("trace/7", 7), ("trace/7/", 7)])
def test_traces(frontend: Frontend, path: str, steps: int) -> None:
    frontend.call({"a": body(b"", "", path)})
    while "a" not in frontend.bodies:
        frontend.call()
    spans = [event for event in json.loads(frontend.bodies["a"])["traceEvents"] if event["ph"] == "X"]
    assert [(span["pid"], span["dur"] * 1000) for span in spans] == [(0, steps), (1, steps)]


def test_a_trace_that_fails_is_still_answered(
    engine: FakeEngine, frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "trace", lambda *_: 1 // 0)
    frontend.call({"a": body(b"", "", "trace")})
    while "a" not in frontend.bodies:
        frontend.call()
    assert frontend.status["a"] == 500


@pytest.mark.parametrize("steps", ["0", "x", "-1", "10001", "1e3", "९", "1/2"])
def test_steps_of_a_trace_that_are_none(frontend: Frontend, steps: str) -> None:
    frontend.call({"a": body(b"", "", f"trace/{steps}")})
    assert (frontend.status["a"], frontend.lines("a")[0]["error"]["field"]) == (400, "steps")

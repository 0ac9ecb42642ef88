"""The mailbox, driven as TorchServe drives it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from tests.handler.fakes import FakeContext, FakeEngine, backend, body, tokenizer
from tests.handler.frontend import HELLO, Frontend, ids_of
from tpserve.engine.errors import EngineError, OverloadedError
from tpserve.engine.in_flight import NewRequest
from tpserve.engine.text.tokenizer import PieceKind
from tpserve.handler.blocking import handle_batch
from tpserve.handler.mailbox import Mailbox
from tpserve.handler.predictions import Defaults


def test_a_stream_from_first_to_last_line(engine: FakeEngine, frontend: Frontend) -> None:
    frontend.call({"a": body(HELLO | {"logprobs": True})})
    prompt, params, _ = engine.submitted["a/0"]
    assert (prompt, params.logprobs) == (tokenizer().encode("once upon a time", bos=True, eos=False), 0)
    ids = ids_of("the cat and a dog")
    engine.say("a/0", ids[:2], logprobs=[-0.5, -1.0])
    frontend.call()
    frontend.call()  # nothing new: no line
    engine.say("a/0", ids[2:3], logprobs=[-2.0])
    engine.say("a/0", ids[3:], "stop", logprobs=[-3.0] * len(ids[3:]))
    frontend.call()
    first, last = frontend.lines("a")
    assert first == {"text": tokenizer().decode(ids[:2]), "ids": ids[:2], "logprobs": [-0.5, -1.0]}
    assert first["text"] + last["text"] == "the cat and a dog"
    assert last["finish_reason"] == "stop"
    n = len(prompt)
    assert last["usage"] == {"prompt_tokens": n, "completion_tokens": len(ids), "total_tokens": n + len(ids)}
    assert (frontend.status["a"], frontend.open) == (200, [])


def test_an_answer_complete_at_once_goes_out_whole(engine: FakeEngine, frontend: Frontend) -> None:
    frontend.call({"a": body(HELLO)})
    engine.say("a/0", ids_of("dog"), "length")
    frontend.call()
    (line,) = frontend.lines("a")
    assert (line["text"], line["finish_reason"]) == ("dog", "length")
    assert "a" not in frontend.chunked


def test_nothing_but_eos(engine: FakeEngine, frontend: Frontend) -> None:
    frontend.call({"a": body(HELLO)})
    engine.say("a/0", [], "stop")
    frontend.call()
    assert frontend.lines("a")[0]["text"] == ""


def test_bytes_of_a_character_are_held_back(engine: FakeEngine, frontend: Frontend) -> None:
    byte_ids = {data[0]: i for i, (kind, _, data) in enumerate(tokenizer().pieces) if kind is PieceKind.BYTES}
    frontend.call({"a": body(HELLO)})
    for byte in "東".encode():
        engine.say("a/0", [byte_ids[byte]])
        frontend.call()
    engine.say("a/0", [byte_ids[0xE6]], "length")
    frontend.call()
    assert [line["text"] for line in frontend.lines("a")] == ["", "", "東", "\ufffd"]


def test_without_stream_one_object(engine: FakeEngine, frontend: Frontend) -> None:
    frontend.call({"a": body(HELLO | {"stream": False})})
    for word in ids_of("the cat"):
        engine.say("a/0", [word])
        frontend.call()
    assert "a" not in frontend.bodies
    engine.say("a/0", [], "stop")
    frontend.call()
    reply = json.loads(frontend.bodies["a"])
    assert (reply["text"], reply["ids"], reply["finish_reason"]) == ("the cat", ids_of("the cat"), "stop")


def test_the_raw_forms(engine: FakeEngine) -> None:
    mailbox = Mailbox(backend(engine, Defaults(mode="chat")))
    frontend = Frontend(mailbox)
    dialogs = [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]
    frontend.call({"raw": body(b"one two", ""), "chat": body(json.dumps(dialogs).encode(), "")})
    engine.say("raw/0", ids_of("three"), "stop")
    engine.say("chat/1", ids_of("dog"), "stop")
    frontend.call()
    assert json.loads(frontend.bodies["raw"]) == [{"generation": "three"}]
    assert "chat" not in frontend.bodies
    engine.say("chat/0", ids_of("cat"), "length")
    frontend.call()
    assert json.loads(frontend.bodies["chat"]) == [
        {"generation": {"role": "assistant", "content": "cat"}},
        {"generation": {"role": "assistant", "content": "dog"}},
    ]
    mailbox.close()


def test_a_refused_request_leaves_its_neighbours_alone(engine: FakeEngine, frontend: Frontend) -> None:
    frontend.call({"good": body(HELLO)})
    engine.say("good/0", ids_of("the"))
    frontend.call({"bad": body(b'{"prompt": "x", "top_k": -1}', ""), "worse": body(b"\xff", "")})
    engine.say("good/0", ids_of(" cat"), "stop")
    frontend.call()
    assert (frontend.status["bad"], frontend.status["worse"], frontend.status["good"]) == (400, 400, 200)
    assert frontend.lines("bad")[0]["error"]["field"] == "top_k"
    assert "".join(line["text"] for line in frontend.lines("good")).startswith("the")


def test_headers_that_are_too_many(engine: FakeEngine, frontend: Frontend) -> None:
    data, headers = body(HELLO, url_path="v1/completions")
    frontend.call({"a": (data, headers | {f"x-{i}": "a" for i in range(101)})})
    assert frontend.status["a"] == 431
    assert "100 headers" in frontend.lines("a")[0]["error"]["message"]


def test_overload_is_429_with_retry_after(engine: FakeEngine, frontend: Frontend) -> None:
    engine.refusal = OverloadedError("full", retry_after_s=7)
    frontend.call({"a": body(HELLO)})
    assert (frontend.status["a"], frontend.headers["a"]) == (429, {"Retry-After": "7"})


def test_an_engine_that_has_given_up_is_503(engine: FakeEngine, frontend: Frontend) -> None:
    engine.refusal = EngineError("rank 1 died")
    frontend.call({"a": body(HELLO)})
    assert (frontend.status["a"], frontend.lines("a")[0]["error"]["message"]) == (503, "rank 1 died")


def test_a_fault_of_ours_is_500_and_says_nothing_of_it(engine: FakeEngine, frontend: Frontend) -> None:
    engine.refusal = ZeroDivisionError("secret")
    frontend.call({"a": body(HELLO)})
    assert frontend.status["a"] == 500
    assert b"secret" not in frontend.bodies["a"]


def test_tokens_that_cannot_be_told_are_their_own_requests_500(engine: FakeEngine, frontend: Frontend) -> None:
    frontend.call({"a": body(HELLO), "b": body(HELLO)})
    engine.say("b/0", ids_of("the"))
    frontend.call()
    for name in ("a/0", "b/0"):
        engine.say(name, [None])  # type: ignore[list-item]
    frontend.call()
    assert (frontend.status["a"], frontend.status["b"], frontend.open) == (500, 200, [])
    assert frontend.lines("b")[-1]["finish_reason"] == "error"
    assert sorted(engine.cancelled) == ["a/0", "b/0"]


def test_an_engine_failure_before_and_after_the_first_chunk(engine: FakeEngine, frontend: Frontend) -> None:
    frontend.call({"early": body(HELLO), "late": body(HELLO), "whole": body(HELLO | {"stream": False})})
    engine.say("late/0", ids_of("the"))
    frontend.call()
    for name in ("early/0", "late/0", "whole/0"):
        engine.say(name, [], "error", error="rank 1 died")
    frontend.call()
    assert (frontend.status["early"], frontend.status["whole"], frontend.status["late"]) == (503, 503, 200)
    last = frontend.lines("late")[-1]
    assert (last["finish_reason"], last["error"]["message"]) == ("error", "rank 1 died")


def test_a_vanished_id_is_cancelled(engine: FakeEngine, frontend: Frontend) -> None:
    frontend.call({"a": body(HELLO), "b": body(HELLO)})
    frontend.open.remove("a")
    frontend.call()
    assert (engine.cancelled, list(engine.submitted)) == (["a/0"], ["b/0"])


def test_one_failed_dialog_cancels_the_others(engine: FakeEngine) -> None:
    mailbox = Mailbox(backend(engine, Defaults(mode="chat")))
    frontend = Frontend(mailbox)
    frontend.call({"a": body([[{"role": "user", "content": "one"}]] * 2)})
    engine.say("a/0", [], "error", error="no")
    frontend.call()
    assert (frontend.status["a"], engine.cancelled) == (503, ["a/1"])
    mailbox.close()


def test_when_nobody_calls_everything_is_cancelled(engine: FakeEngine, frontend: Frontend) -> None:
    frontend.call({"a": body(HELLO), "b": body(HELLO)})
    deadline_s = time.monotonic() + 5
    while engine.submitted and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert sorted(engine.cancelled) == ["a/0", "b/0"]
    frontend.call()  # TorchServe was only slow: both get an answer
    assert (frontend.status["a"], frontend.status["b"]) == (503, 503)


def test_a_call_returns_soon_with_nothing_to_say(engine: FakeEngine, frontend: Frontend) -> None:
    start_s = time.monotonic()
    context = frontend.call({"a": body(HELLO)})
    assert time.monotonic() - start_s < 1
    assert context.request_ids == {}


def test_health_and_status(engine: FakeEngine, frontend: Frontend) -> None:
    def ask(name: str, path: str) -> dict[str, Any]:
        frontend.call({name: body(b"", "", path)})
        while name not in frontend.bodies:
            frontend.call()
        return frontend.lines(name)[0]

    assert ask("a", "health")["status"] == "ready"
    assert ask("live", "health/live") == {"status": "alive"}
    engine.ready, engine.failure = False, "rank 1 died"
    time.sleep(0.25)  # a probe's answer holds so long for all that ask
    assert ask("b", "health/ready")["reason"] == "rank 1 died"
    assert ask("c", "v2/nothing")["error"]["code"] == 404
    assert ask("t", "v2/health/ready") == {"error": "rank 1 died"}
    assert [frontend.status[name] for name in ("a", "live", "b", "c", "t")] == [200, 200, 503, 404, 503]
    frontend.call({"d": body(b"", "", "status")})
    while "d" not in frontend.bodies:
        frontend.call()
    assert [rank["num_blocks_in_use"] for rank in frontend.lines("d")[0]["ranks"]] == [0, 0]


def test_a_classic_batch_waits_for_all_and_streams_nothing(engine: FakeEngine) -> None:
    class Talkative(FakeEngine):
        def submit_together(self, new: Sequence[NewRequest], **urgency: Any) -> None:
            super().submit_together(new, **urgency)
            for request in new:
                self.say(request.request_id, ids_of("the cat")[:1])
                self.say(request.request_id, ids_of("the cat")[1:], "stop")

    pairs = [body(HELLO), body({"prompt": "x", "top_p": 2}), body(b"raw", "")]
    context = FakeContext(["a", "b", "c"], [headers for _, headers in pairs])
    results = handle_batch(backend(Talkative()), [data for data, _ in pairs], context)
    assert json.loads(results[0])["text"] == "the cat"
    assert json.loads(results[1])["error"]["field"] == "top_p"
    assert json.loads(results[2]) == [{"generation": "the cat"}]
    assert (context.status, context.stopping_criteria) == ({1: (400, "Bad Request")}, None)

"""The second front: paths, streams, clients that go, and who may ask; `test_asgi_limits.py` has its limits,
`test_asgi_ends.py` how it begins and ends."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.handler.frontend import HELLO, ids_of
from tests.handler.web import PREDICT, Web, serving, wait_for
from tpserve.handler.wakeups import Wakeup, Wakeups

WHOLE = {**HELLO, "stream": False}
BODY = json.dumps(HELLO)
POST = f"POST {PREDICT} HTTP/1.1\nHost: x\n"


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with serving() as web:
        yield web
        assert not web.engine.submitted


def test_a_stream_is_sent_as_it_is_made(web: Web) -> None:
    with web.raw(f"{POST}Content-Length: {len(BODY)}\n\n{BODY}") as connection, connection.makefile("rb") as reader:
        (engine_id,) = web.submitted()
        web.engine.say(engine_id, ids_of("once"))
        assert reader.readline() == b"HTTP/1.1 200 OK\r\n"
        headers = list(iter(reader.readline, b"\r\n"))
        assert b"transfer-encoding: chunked\r\n" in [line.lower() for line in headers]
        reader.readline()
        assert json.loads(reader.readline()) == {"text": "once", "ids": ids_of("once")}
        reader.readline()
        web.engine.say(engine_id, ids_of("upon"), "stop")
        reader.readline()
        assert json.loads(reader.readline())["finish_reason"] == "stop"
        assert [reader.readline() for _ in range(3)] == [b"\r\n", b"0\r\n", b"\r\n"]
        # The connection is as good as new.
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert reader.readline() == b"HTTP/1.1 200 OK\r\n"


def test_what_one_step_has_to_say_wakes_the_loop_once() -> None:
    async def scenario() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        calls, woken = 0, 0
        original = loop.call_soon_threadsafe

        def counted(*args: object) -> asyncio.Handle:
            nonlocal calls
            calls += 1
            return original(*args)  # type: ignore[arg-type]

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign,assignment]
        wakeups = Wakeups(loop)
        all_of_them = [Wakeup(wakeups) for _ in range(20)]

        async def wait(wakeup: Wakeup) -> None:
            nonlocal woken
            await wakeup.wait()
            woken += 1

        tasks = [asyncio.create_task(wait(wakeup)) for wakeup in all_of_them]
        await asyncio.sleep(0)
        thread = threading.Thread(target=lambda: [wakeup.set() for wakeup in all_of_them])
        thread.start()
        thread.join()  # the loop stands still meanwhile
        await asyncio.gather(*tasks)
        del loop.call_soon_threadsafe
        return calls, woken

    assert asyncio.run(scenario()) == (1, 20)


@pytest.mark.parametrize("said", ["nothing", "something"])
@pytest.mark.parametrize("body", [HELLO, WHOLE], ids=["stream", "whole"])
def test_a_client_that_goes_is_noticed(web: Web, said: str, body: dict[str, object]) -> None:
    text = json.dumps(body)
    with web.raw(f"{POST}Content-Length: {len(text)}\n\n{text}") as connection:
        (engine_id,) = web.submitted()
        if said == "something":
            web.engine.say(engine_id, ids_of("once"))
            if body is HELLO:
                assert connection.recv(12) == b"HTTP/1.1 200"
    wait_for(lambda: engine_id in web.engine.cancelled, timeout_s=1.0)


def _predict(web: Web, method: str, path: str) -> dict[str, object]:
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(web.ask, method, path, WHOLE)
        (engine_id,) = web.submitted()
        web.engine.say(engine_id, ids_of("the cat"), "stop")
        answer = asked.result()
    assert answer.status == 200
    assert int(answer.headers["content-length"]) == len(answer.body)
    result: dict[str, object] = answer.json
    return result


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", PREDICT), ("PUT", PREDICT), ("POST", PREDICT + "/1.0"), ("POST", PREDICT + "/1.0/?priority=high")],
)
def test_predictions(web: Web, method: str, path: str) -> None:
    assert _predict(web, method, path)["text"] == "the cat"


@pytest.mark.parametrize("prefix", ["", PREDICT, PREDICT + "/1.0"])
@pytest.mark.parametrize("path", ["/health", "/status", "/metrics", "/trace/7"])
def test_looking_inside(web: Web, prefix: str, path: str) -> None:
    answer = web.ask("GET", prefix + path)
    assert answer.status == 200
    marks = {"/health": b'"ready"', "/status": b'"ranks"', "/metrics": b"# TYPE", "/trace/7": b"traceEvents"}
    assert marks[path] in answer.body
    head = web.ask("HEAD", prefix + path)
    assert (head.status, head.body) == (200, b"")


def test_requests_are_counted_by_path_and_status(web: Web) -> None:
    for path in ("/nowhere/1", "/nowhere/2"):
        assert web.ask("GET", path).status == 404
    lines = web.ask("GET", "/metrics").body.decode().splitlines()
    counts = dict(line.rsplit(" ", 1) for line in lines if line.startswith("tpserve:http_requests_total{"))
    assert int(counts['tpserve:http_requests_total{path="other",status="404"}']) >= 2
    assert not [name for name in counts if "nowhere" in name]
    assert lines.count("# TYPE tpserve:http_requests_total counter") == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", PREDICT, 405, "POST, PUT"),
        ("DELETE", PREDICT, 405, "POST, PUT"),
        ("POST", "/health", 405, "GET, HEAD"),
        ("POST", "/", 405, "GET, HEAD"),
        ("OPTIONS", "/health", 405, "GET, HEAD"),
        ("GET", "/nowhere", 404, None),
        ("POST", "//", 404, None),
        ("POST", "/predictions/llamas", 404, None),
        ("POST", "/predictions", 404, None),
        ("GET", "/page/../asgi.py", 404, None),
    ],
)
def test_what_is_not_there(web: Web, method: str, path: str, status: int, allow: str | None) -> None:
    answer = web.ask(method, path)
    assert (answer.status, answer.headers.get("allow")) == (status, allow)
    assert answer.json["error"]["code"] == status


def test_an_unknown_path_names_the_known_ones(web: Web) -> None:
    assert "/metrics" in web.ask("GET", "/nowhere").json["error"]["message"]
    assert "'llama'" in web.ask("POST", "/predictions/other").json["error"]["message"]


def test_each_protocol_hears_refusals_in_its_own_form(web: Web) -> None:
    openai = web.ask("GET", "/v1/chat/completions")
    assert (openai.status, openai.headers["allow"]) == (405, "POST")
    assert openai.json["error"]["code"] == "method_not_allowed"
    for method in ("GET", "POST"):
        assert web.ask(method, "/v1/nowhere").json["error"]["code"] == "not_found"
    assert isinstance(web.ask("GET", "/v2/nowhere").json["error"], str)
    assert web.ask("GET", "/v2/models/llama/infer").headers["allow"] == "POST"
    assert set(web.ask("GET", "/nowhere").json["error"]) == {"message", "field", "code"}


@pytest.mark.parametrize("prefix", ["", PREDICT, PREDICT + "/1.0"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/llama", "/version", "/v2", "/v2/models/llama/ready"])
def test_what_is_asked_for_with_get(web: Web, prefix: str, path: str) -> None:
    assert web.ask("GET", prefix + path).status == 200
    assert web.ask("POST", prefix + path).status == 405


def test_a_chat_is_a_stream_of_events(web: Web) -> None:
    body = {"model": "llama", "messages": [{"role": "user", "content": "a"}], "stream": True}
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(web.ask, "POST", "/v1/chat/completions", body)
        (engine_id,) = web.submitted()
        web.engine.say(engine_id, ids_of("once"), "stop")
        answer = asked.result()
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.body.endswith(b"data: [DONE]\n\n")


# Who may ask.


@pytest.fixture(scope="module")
def guarded() -> Iterator[Web]:
    with serving(keys=("secret-1", "secret-2")) as web:
        yield web


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer secret-3", "Basic secret-1", "secret-1", "Bearer s\xe9"])
def test_without_a_key(guarded: Web, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    for path in ("/metrics", "/status", "/nowhere", PREDICT, "/predictions/other", "/v1/models"):
        answer = guarded.ask("GET", path, headers=headers)
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    openai = guarded.ask("POST", "/v1/chat/completions", b"{", headers).json["error"]
    assert (openai["code"], openai["type"], openai["param"]) == ("invalid_api_key", "invalid_request_error", None)


@pytest.mark.parametrize("path", ["/", "/page/chat.js", "/health", "/health/live", "/health/ready"])
def test_what_needs_no_key(guarded: Web, path: str) -> None:
    assert guarded.ask("GET", path).status == 200


@pytest.mark.parametrize("given", ["Bearer secret-1", "bearer secret-2", "Bearer  secret-2 "])
def test_with_a_key(guarded: Web, given: str) -> None:
    assert guarded.ask("GET", "/metrics", headers={"Authorization": given}).status == 200


# What is written down and what is handed on.


def test_the_access_log(guarded: Web, caplog: pytest.LogCaptureFixture) -> None:
    headers = {"Authorization": "Bearer secret-1", "X-Request-ID": "mine-7"}
    with caplog.at_level(logging.INFO, "tpserve.access"):
        answer = guarded.ask("PUT", PREDICT + "/?token=private", {"prompt": "personal", "top_p": 7}, headers)
        # It is written when the answer has been sent: an earlier test's may come as late as this.
        wait_for(lambda: "mine-7" in caplog.text)
    assert answer.headers["x-request-id"] == "mine-7"
    assert "secret" not in caplog.text
    lines = [json.loads(record.message) for record in caplog.records]
    (line,) = [line for line in lines if line["request_id"] == "mine-7"]
    assert line.pop("duration_ms") >= 0
    assert line.pop("time").endswith("Z")
    assert line == {
        "client": "127.0.0.1",
        "method": "PUT",
        "path": PREDICT + "/",
        "status": 400,
        "bytes_out": len(answer.body),
        "request_id": "mine-7",
    }


@pytest.mark.parametrize("asked", ["a b", 'x"y', "a" * 129, "", "\xe9"])
def test_request_ids_that_are_not_repeated(web: Web, asked: str) -> None:
    given = web.ask("GET", "/health", headers={"X-Request-ID": asked}).headers["x-request-id"]
    assert given != asked
    assert len(given) == 32


def test_other_sites_pages_may_not_ask_unless_they_are_named(web: Web) -> None:
    origin = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in web.ask("GET", "/health", headers=origin).headers
    assert web.ask("OPTIONS", PREDICT, headers=origin).status == 405
    with serving(keys=("k",), allowed_origins="https://chat.example, https://b.example") as open_web:
        asked_before = open_web.ask("OPTIONS", PREDICT, headers=origin)  # browsers send no key with it
        assert (asked_before.status, asked_before.headers["access-control-allow-origin"]) == (200, origin["Origin"])
        refused = open_web.ask("GET", "/metrics", headers=origin)
        assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, origin["Origin"])
        other = open_web.ask("GET", "/health", headers={**origin, "Origin": "https://c.example"})
        assert "access-control-allow-origin" not in other.headers

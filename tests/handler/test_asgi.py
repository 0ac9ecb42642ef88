"""The second front: paths, streams, clients that go, limits, and who may ask."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.handler.fakes import FakeEngine
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


# Limits.


@pytest.fixture(scope="module")
def narrow() -> Iterator[Web]:
    with serving(max_request_bytes=1000, request_timeout_s=0.4, max_connections=3) as web:
        yield web
        assert not web.engine.submitted


def _status(connection: socket.socket) -> int:
    line = b""
    while b"\r\n" not in line:
        received = connection.recv(4096)
        assert received, "closed without a word"
        line += received
    return int(line.split()[1])


def _closed(connection: socket.socket) -> None:
    """Returns when the front has closed."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass


def test_a_body_that_is_announced_too_large(narrow: Web) -> None:
    with narrow.raw(f"{POST}Content-Length: 1001\n\n") as connection:  # nothing of it is waited for
        assert _status(connection) == 413
    with narrow.raw(f"{POST}Content-Length: 9{'0' * 18}\nExpect: 100-continue\n\n") as connection:
        assert _status(connection) == 413


def test_a_body_of_unknown_length_is_read_to_the_limit_only(narrow: Web) -> None:
    chunk = b"64\r\n" + b" " * 100 + b"\r\n"
    with narrow.raw(f"{POST}Transfer-Encoding: chunked\n\n", chunk * 10) as connection:
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):  # exactly as long as it may be
            connection.recv(1)
        connection.settimeout(10)
        connection.sendall(chunk)
        assert _status(connection) == 413
        # Who goes on sending is listened to for a moment, and not for ever.
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012
            for _ in range(500):
                connection.sendall(chunk)
                time.sleep(0.01)
    assert not narrow.engine.submitted


def test_a_refusal_reaches_those_who_send_before_they_look(narrow: Web) -> None:
    answer = narrow.ask("POST", PREDICT, b" " * 3_000_000)
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert "max_request_bytes" in answer.json["error"]["message"]


@pytest.mark.parametrize("header", ["X-A: {}\n".format("a" * 20_000), "".join(f"X-{i}: a\n" for i in range(101))])
def test_headers_that_are_too_many_or_too_long(narrow: Web, header: str) -> None:
    with narrow.raw(f"GET /health HTTP/1.1\nHost: x\n{header}\n") as connection:
        assert _status(connection) == 431


def test_headers_that_never_end_are_cut_at_their_limit(narrow: Web) -> None:
    with narrow.raw("GET /health HTTP/1.1\nX-A: " + "a" * 40_000) as connection:
        assert _status(connection) == 431


@pytest.mark.parametrize("coding", ["gzip", "br"])
def test_bodies_are_not_unpacked(narrow: Web, coding: str) -> None:
    assert narrow.ask("POST", PREDICT, HELLO, {"Content-Encoding": coding}).status == 415


def test_a_body_that_is_too_slow(narrow: Web) -> None:
    begun_s = time.monotonic()
    with narrow.raw(f"{POST}Content-Length: 100\n\n{{") as connection:
        assert _status(connection) == 408
        assert 0.3 < time.monotonic() - begun_s < 2


@pytest.mark.parametrize("sent", ["", "GET /health HTTP/1.1\nX-A"], ids=["nothing", "half a header"])
def test_headers_that_do_not_come(narrow: Web, sent: str) -> None:
    with narrow.raw(sent) as connection:
        connection.settimeout(3)
        _closed(connection)


def test_more_requests_than_may_be_open(narrow: Web) -> None:
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(narrow.ask, "POST", PREDICT, WHOLE) for _ in range(3)]
        engine_ids = narrow.submitted(at_least=3)
        refused = narrow.ask("POST", PREDICT, HELLO)
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert narrow.ask("GET", "/health").status == 200  # or the busiest server would be restarted
        for engine_id in engine_ids:
            narrow.engine.say(engine_id, ids_of("once"), "stop")
        assert [one.result().status for one in asked] == [200] * 3


def test_more_bytes_of_bodies_than_are_held() -> None:
    with serving(engine=FakeEngine()) as web:
        web.front._limits = dataclasses.replace(web.front._limits, max_buffered_bytes=1000)
        with web.raw(f"{POST}Content-Length: 1001\n\n{' ' * 990}"):
            wait_for(lambda: web.front._num_buffered == 990)
            refused = web.ask("POST", PREDICT, HELLO)
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        wait_for(lambda: web.front.num_requests == 0)
        assert web.ask("POST", PREDICT, {"prompt": 1}).status == 400  # what was held has been given back


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


# Beginnings and ends.


def test_while_the_engine_starts() -> None:
    with serving(ready=False) as web:
        assert web.ask("GET", "/health/live").status == 200
        for path in ("/health", "/health/ready", "/metrics"):
            assert web.ask("GET", path).status == 503
        refused = web.ask("POST", PREDICT, HELLO)
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")


def test_draining_lets_run_what_runs_and_takes_nothing_new() -> None:
    with serving() as web, ThreadPoolExecutor() as pool:
        running = pool.submit(web.ask, "POST", PREDICT, HELLO)
        (engine_id,) = web.submitted()
        web.front.draining = True
        for path in ("/health", "/health/ready"):
            health = web.ask("GET", path)
            assert (health.status, health.json["status"]) == (503, "draining")
        assert web.ask("GET", "/health/live").status == 200
        refused = web.ask("POST", PREDICT, HELLO)
        assert (refused.status, refused.headers["retry-after"], refused.headers["connection"]) == (503, "5", "close")
        assert web.ask("GET", "/status").status == 200
        web.engine.say(engine_id, ids_of("once"), "stop")
        assert running.result().json["finish_reason"] == "stop"


def test_what_is_cut_off_says_so() -> None:
    with serving() as web, ThreadPoolExecutor() as pool:
        running = [pool.submit(web.ask, "POST", PREDICT, HELLO)]
        (begun,) = web.submitted()
        web.engine.say(begun, ids_of("once"))
        running += [pool.submit(web.ask, "POST", PREDICT, body) for body in (HELLO, WHOLE)]
        engine_ids = web.submitted(at_least=3)
        time.sleep(0.1)  # for the first line to be sent
        asyncio.run_coroutine_threadsafe(_fail_all(web), web.loop).result()
        answers = [one.result() for one in running]
        wait_for(lambda: set(web.engine.cancelled) == set(engine_ids))  # after the client has its answer
    assert [answer.status for answer in answers] == [200, 503, 503]
    lines = [json.loads(answer.body.splitlines()[-1]) for answer in answers]
    assert {line["error"]["message"] for line in lines} == {"the server is shutting down"}
    assert [line.get("finish_reason") for line in lines] == ["error", None, None]


async def _fail_all(web: Web) -> None:
    web.front.fail_all("the server is shutting down")


def test_https_for_those_who_have_a_certificate(tmp_path: Path) -> None:
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    cert, key = str(tmp_path / "cert"), str(tmp_path / "key")
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run(["openssl", *made.split(), *files], check=True, capture_output=True)
    question = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    context = ssl.create_default_context(cafile=cert)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # where it is the server who may choose badly
    with serving(ssl_certfile=cert, ssl_keyfile=key, ssl_ca_certs=cert) as web:
        with web.raw("") as plain, pytest.raises((ssl.SSLError, ConnectionResetError)):
            context.wrap_socket(plain, server_hostname="127.0.0.1")
        context.load_cert_chain(cert, key)
        with web.raw("") as plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as known:
            name, *_ = known.cipher() or ("",)
            assert name.startswith("ECDHE") and ("GCM" in name or "CHACHA20" in name)  # noqa: PT018
            known.sendall(question)
            assert known.recv(15) == b"HTTP/1.1 200 OK"

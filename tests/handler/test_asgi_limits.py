"""The second front's limits: bodies, headers, slowness, and how much is held at a time."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.handler.fakes import FakeEngine
from tests.handler.frontend import HELLO, ids_of
from tests.handler.web import PREDICT, Web, serving, wait_for

WHOLE = {**HELLO, "stream": False}
POST = f"POST {PREDICT} HTTP/1.1\nHost: x\n"


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

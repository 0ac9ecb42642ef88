"""Requests that nobody should send, at the backend and at the second front: a declared status, and nobody else hurt.

`tests.faults.fuzz` sends many more to a running server.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.fuzz import DECLARED
from tests.faults.fuzz_requests import Fuzzer
from tests.handler.fakes import FakeEngine, backend, settled
from tests.handler.web import PREDICT, serving
from tpserve.handler.http import HttpRequest
from tpserve.handler.replies import Reply

ENGINE = FakeEngine()
BACKEND = backend(ENGINE)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 3))
def test_the_backend_answers_whatever_comes(seed: int, num_cuts: int) -> None:
    path, content = Fuzzer(seed).body()
    raw, chance = json.dumps(content).encode(), random.Random(seed)
    for _ in range(num_cuts):
        at = chance.randrange(len(raw) + 1)
        raw = raw[:at] + chance.choice((b"", b"[" * 200, chance.randbytes(3))) + raw[at + 2 :]
    opened = settled(BACKEND.serve("r", HttpRequest(path, raw, "application/json"), threading.Event()))
    if isinstance(opened, Reply):
        assert opened.status in DECLARED - {503}, opened.body
        assert opened.status == 200 or json.loads(opened.body)["error"]
    else:
        opened.fail("the end")
        assert opened.take() is not None
        BACKEND.cancel(opened)
    assert not ENGINE.submitted


def test_the_second_front_outlives_what_is_no_http() -> None:
    fuzzer = Fuzzer(7, predictions=PREDICT.strip("/"))
    with serving(request_timeout_s=0.3) as web:
        for _ in range(100):
            raw = fuzzer.request().raw
            with socket.create_connection(("127.0.0.1", web.port), timeout=10) as connection:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(raw)
                    connection.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError):
                    head = connection.recv(12)
                    assert not head or int(head[9:12]) in {*DECLARED, 100}, (raw[:200], head)
        assert web.ask("GET", "/health").status == 200


def test_slow_senders_do_not_keep_others_waiting() -> None:
    with serving(request_timeout_s=2.0) as web, contextlib.ExitStack() as slow:
        heads = ("POST /v1/completions HTTP/1.1\nHost: x\nX-Slow: ",
                 "POST /v1/completions HTTP/1.1\nHost: x\nContent-Length: 2000000\n\n{")  # fmt: skip
        senders = [slow.enter_context(web.raw(heads[i % 2])) for i in range(200)]
        assert web.ask("POST", PREDICT, {"prompt": 5}).status == 400  # though 200 MB have been announced
        for sender in senders:
            with contextlib.suppress(ConnectionError):
                head = sender.recv(12)
                assert head in (b"", b"HTTP/1.1 408")

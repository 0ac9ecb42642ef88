"""The second front before the engine is ready, while it drains, and when it is cut off; and by HTTPS."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.handler.frontend import HELLO, ids_of
from tests.handler.web import PREDICT, Web, serving, wait_for

WHOLE = {**HELLO, "stream": False}


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

"""What strangers can read in what we say: errors and logs; see docs/security.md."""

from __future__ import annotations

import json
import logging
import re
import threading
from typing import Any

import pytest

from tests.handler.fakes import FakeEngine, tokenizer
from tests.handler.web import CHAT, PREDICT, TEXT, TRITON, Web, serving
from tpserve.engine.errors import ConfigError, EngineError
from tpserve.handler.replies import public

FILE = "/srv/secret/checkpoints/layers.7.distcp"
# What no reply may hold: folders, Python's files, frames, names of objects in memory.
LEAK = re.compile(
    rb"/(srv|tmp|work|home|usr|root)/|site-packages|\.py\b|Traceback|line \d+, in|0x[0-9a-f]{6}| object at 0x\d"
)

WRONG: list[tuple[str, str, Any, dict[str, str]]] = [
    ("GET", "/nowhere", None, {}),
    ("GET", "/../../etc/passwd", None, {}),
    ("POST", "/predictions/other", {"prompt": "x"}, {}),
    ("DELETE", CHAT, None, {}),
    ("POST", "/v2/models/other/generate", {"text_input": "x"}, {}),
    ("POST", "/v2/repository/index", {}, {}),
    ("GET", "/v2/models/llama/versions/7", None, {}),
    ("GET", "/trace/x", None, {}),
    ("POST", CHAT, b"\xff\xfe", {}),
    ("POST", CHAT, b"{" * 20_000, {}),
    ("POST", CHAT, {"messages": "x"}, {"Content-Encoding": "gzip"}),
    *((
        "POST", path, body, {}
    ) for path in (PREDICT, CHAT, TEXT, TRITON) for body in (
        {}, [], "x", {"prompt": 5}, {"prompt": "x", "guided_regex": "("},
        {"prompt": "x", "guided_json": {"type": "no"}},
        {"prompt": "x", "guided_choice": object.__name__}, {"messages": [{"role": "x"}]}, {"text_input": None},
        {"prompt": "x", "max_tokens": 10**30}, {"text_input": "x", "temperature": "hot"},
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}},
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {"name": "%"}}]},
    )),
]  # fmt: skip

GOOD: dict[str, dict[str, Any]] = {
    PREDICT: {"prompt": "one two"},
    CHAT: {"messages": [{"role": "user", "content": "one two"}]},
    TEXT: {"prompt": "one two"},
    TRITON: {"text_input": "one two"},
    "/v2/models/llama/generate_stream": {"text_input": "one two"},
}

FAULTS: list[Exception] = [
    EngineError(f"the engine has given up: {FILE} is damaged (<Rank object at 0x7f12345678ab>)"),
    EngineError(f'Traceback (most recent call last):\n  File "{FILE}.py", line 3, in f\nOSError: {FILE}: no'),
    ConfigError(f"{FILE} is damaged"),
    RuntimeError(f"{FILE} at 0x7f12345678ab"),
    KeyError(FILE),
]


def test_errors_name_no_folder_and_no_address() -> None:
    engine = FakeEngine()
    with serving(engine=engine) as web:
        for method, path, body, headers in WRONG:
            answer = web.ask(method, path, body, headers)
            assert 400 <= answer.status < 500, (path, body, answer.body)
            assert not LEAK.search(answer.body), (path, body, answer.body)
        for fault in FAULTS:
            engine.refusal = fault
            for path, body in GOOD.items():
                for stream in (False, True):
                    answer = web.ask("POST", path, body | ({} if path.startswith("/v2") else {"stream": stream}))
                    assert answer.status in (500, 503), (path, answer.body)
                    assert not LEAK.search(answer.body), (path, fault, answer.body)
        engine.refusal = None
        for path, body in GOOD.items():
            for stream in (False, True):
                for begun in (False, True):
                    body = body | ({} if path.startswith("/v2") else {"stream": stream})
                    assert not LEAK.search(dying(web, path, body, begun)), (path, stream, begun)


def dying(web: Web, path: str, body: dict[str, Any], begun: bool) -> bytes:
    """The reply to a request whose engine dies."""
    replies: list[bytes] = []
    thread = threading.Thread(target=lambda: replies.append(web.ask("POST", path, body).body))
    thread.start()
    (request_id,) = web.submitted()
    if begun:
        web.engine.say(request_id, tokenizer().encode("one two three", bos=False, eos=False))
    web.engine.say(request_id, [], "error", error=f"the engine has given up: {FILE} is damaged 0x7f12345678ab")
    thread.join()
    assert b"layers.7.distcp" in replies[0], replies[0]
    return replies[0]


def test_files_are_named_without_their_folders() -> None:
    assert public(f"{FILE} is damaged") == "layers.7.distcp is damaged"
    assert public(f"gave up: '{FILE}', again") == "gave up: 'layers.7.distcp', again"
    assert public("3/4 of it, http://a.b/c/d, and/or #/$defs/x") == "3/4 of it, http://a.b/c/d, and/or #/$defs/x"
    assert public("<x at 0x7f0011223344>") == "<x at 0x…>"


def test_logs_hold_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    word = "xylophonesecret"
    engine = FakeEngine()
    with caplog.at_level(logging.INFO), serving(engine=engine, keys=(word + "key",)) as web:
        headers = {"Authorization": f"Bearer {word}key"}
        for path, body in GOOD.items():
            text = json.dumps(body).replace("one two", word)
            for fault in (EngineError("no"), RuntimeError("ours")):
                engine.refusal = fault
                assert web.ask("POST", path, text.encode(), headers).status in (500, 503)
                assert web.ask("POST", path, text.encode()).status == 401
            assert web.ask("POST", path, (text + "}").encode(), headers).status == 400
            assert (
                web.ask("POST", path, text.replace("{", '{"temperature": "hot", ', 1).encode(), headers).status == 400
            )
            assert web.ask("GET", f"{path}?key={word}", None, headers).status in (404, 405)
    assert caplog.text.count('"status": 401') >= 5  # the access log is there
    assert word not in caplog.text

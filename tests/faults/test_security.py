"""What strangers can reach, or make us reach; see docs/security.md."""

from __future__ import annotations

import ast
import contextlib
import hmac
import json
import re
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.handler.fakes import tokenizer
from tests.handler.web import CHAT, PREDICT, TEXT, TRITON, serving, wait_for
from tests.test_architecture import MAY_IMPORT, ROOT
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import RequestError
from tpserve.engine.guided import Grammars
from tpserve.engine.sampling_params import Guided
from tpserve.engine.supervisor import _environment
from tpserve.handler.api_keys import ApiKeys
from tpserve.handler.front_config import FrontConfig
from tpserve.handler.server_process import _packaged_properties


def test_both_fronts_listen_on_loopback_unless_they_are_told() -> None:
    properties = _packaged_properties()
    addresses = {name: value for name, value in properties.items() if name.endswith("address")}
    assert len(addresses) == 5
    for value in addresses.values():
        assert value.removeprefix("http://").partition(":")[0] == "127.0.0.1"
    # What stands in environment variables does not change that, and nobody registers models over HTTP.
    assert (properties["enable_envvars_config"], properties["enable_model_api"]) == ("false", "false")
    assert properties["allowed_urls"].startswith("file://")
    assert "plugins_path" not in properties
    assert FrontConfig.from_options("nowhere", None, {}).host == "127.0.0.1"


def test_ranks_talk_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_running.py` looks at the sockets of a gloo group; NCCL's were looked at on two H200s."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    environment = _environment(EngineConfig(checkpoint_dir="nowhere"))
    assert (environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("lo", "lo")


# Of calls in the rooms: what would execute what it reads, or pickle what it sends.
FORBIDDEN = {
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list", "send_pyobj", "recv_pyobj", "send_serialized", "unsafe_load", "full_load", "eval_file",
}  # fmt: skip
# (module, function) → the files that may call it
ONLY_IN = {
    ("pickle", "load"): set(),
    ("pickle", "loads"): set(),
    ("yaml", "load"): set(),
    ("torch", "load"): {"convert/shard_files.py", "convert/verify.py"},  # with weights_only, see below
    ("os", "system"): set(),
    ("jinja2", "Environment"): set(),
    ("jinja2", "Template"): set(),
}  # fmt: skip


def test_nothing_is_unpickled_or_evaluated() -> None:
    for room in MAY_IMPORT.keys() - {"bench"}:  # which nobody serves with
        for path in (ROOT / room).rglob("*.py"):
            where = str(path.relative_to(ROOT))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    check_call(node, where)


def check_call(call: ast.Call, where: str) -> None:
    if isinstance(call.func, ast.Name):
        assert call.func.id not in {"eval", "exec", "compile"} | FORBIDDEN, where
        return
    if not isinstance(call.func, ast.Attribute):
        return
    name = call.func.attr
    assert name not in FORBIDDEN, (where, name)
    module = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
    assert where in ONLY_IN.get((module, name), {where}), (where, module, name)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if (module, name) == ("torch", "load"):
        assert ast.literal_eval(keywords["weights_only"]) is True
    assert "allow_pickle" not in keywords, where
    shell = keywords.get("shell")
    assert shell is None or ast.literal_eval(shell) is False, where


# Sockets between machines: the one address in a file, and what makes both ends encrypt.
BETWEEN_MACHINES = {
    "meeting.py": ('f"tcp://{host}:*"', "keys.server_secret"),
    "node_hub.py": ('f"tcp://{host}:{config.node_port}"', '"curve_secretkey": keys.head_secret'),
    "node_agent.py": ('f"tcp://{where}"', "curve_serverkey=self._keys.head_public"),
}


def test_sockets_between_processes_are_ipc() -> None:
    for room in ("engine", "handler"):
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            address, encrypted = BETWEEN_MACHINES.get(path.name, ("", ""))
            if address:
                assert encrypted in text
                assert text.count("tcp://") == 1
                text = text.replace(address, "")
            assert not re.search(r"tcp://|inproc://|pgm://", text), path
            assert "requests" not in re.findall(r"^import (\w+)", text, re.MULTILINE), path


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = ApiKeys(["first", "second", "third"])
    for given, allowed in (("first", True), ("third", True), ("x", False), ("", False)):
        compared.clear()
        assert keys.allow({"authorization": f"Bearer {given}"}) is allowed
        assert compared == [b"first", b"second", b"third"]  # all of them, whichever it is


@contextlib.contextmanager
def trap() -> Iterator[tuple[str, list[object]]]:
    """A place on this machine that nobody should ask; its URL, and who has."""
    came: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.05)
        done = threading.Event()

        def listen() -> None:
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, address = listening.accept()
                    came.append(address)
                    connection.close()

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/x", came
        finally:
            done.set()
            thread.join()


def with_urls(url: str) -> list[tuple[str, dict[str, Any]]]:
    """Requests that name something elsewhere."""
    user = {"role": "user", "content": "hello"}
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    schema = {"$schema": url, "$id": url, "$ref": url + "#/a"}
    named = {"name": "s", "schema": schema}
    function = {"name": "f", "description": url, "parameters": schema}
    return [
        (CHAT, {"messages": [image]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": url}}]}]}),
        (CHAT, {"messages": [user], "chat_template": url, "chat_template_kwargs": {"url": url}}),
        (CHAT, {"messages": [user], "tools": [{"type": "function", "function": function}], "tool_choice": "required"}),
        (CHAT, {"messages": [user], "tools": [{"type": "mcp", "server_url": url}]}),
        (CHAT, {"messages": [user], "response_format": {"type": "json_schema", "json_schema": named}}),
        (CHAT, {"messages": [user], "model": url}),
        (TEXT, {"prompt": url, "guided_json": schema}),
        (PREDICT, {"prompt": url, "guided_json": schema}),
        (PREDICT, {"prompt": "hello", "webhook": url}),
        (TRITON, {"text_input": "hello", "image_bytes": url, "image_url_input": url}),
        ("/v2/systemsharedmemory/region/a/register", {"key": url}),
    ]  # fmt: skip


def test_nobody_makes_us_ask_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    lookup = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: asked.append(host) or lookup(host, *a, **k))
    with trap() as (url, came), serving() as web:
        for path, body in with_urls(url):
            data = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {len(data)}\n\n"
            with web.raw(head, data) as connection:  # refused, or taken as text
                wait_for(lambda: web.engine.submitted or select.select([connection], [], [], 0)[0])
            wait_for(lambda: not web.engine.submitted)
        grammars = Grammars(tokenizer(), tokenizer().vocab_size)
        for reference in (url, url + "#/a", url.replace("http", "https"), "file:///etc/passwd"):
            for schema in ({"$ref": reference}, {"$id": url, "$ref": "other"}, {"$schema": reference, "type": "null"}):
                with contextlib.suppress(RequestError):
                    grammars.check(Guided("json", json.dumps(schema)))
        assert not came
    assert set(asked) <= {"127.0.0.1"}

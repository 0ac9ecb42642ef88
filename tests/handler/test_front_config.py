"""Options of `tpserve serve`, and keys from everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tpserve.engine.errors import ConfigError
from tpserve.handler.api_keys import VARIABLE, ApiKeys
from tpserve.handler.front_config import FrontConfig
from tpserve.handler.http_server import listen, make_server


def test_options_of_the_front_the_engine_and_the_requests() -> None:
    options = {"port": 0, "max_seq_len": 99, "temperature": 0.5, "drain_timeout_s": 3, "max_batch_size": 7}
    config = FrontConfig.from_options("/a/llama-7b", 2, options)
    assert (config.port, config.drain_timeout_s, config.model_name) == (0, 3.0, "llama-7b")
    engine = config.handler.engine
    assert (engine.tensor_parallel_size, engine.max_seq_len, engine.max_num_seqs) == (2, 99, 7)
    assert engine.checkpoint_dir == "/a/llama-7b"
    assert config.handler.defaults.params.temperature == 0.5
    assert FrontConfig.from_options("a", None, {"served_model_name": "b/c"}).model_name == "b/c"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prot": 1}, r"unknown option 'prot' \(did you mean 'port'\?\)"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"checkpoint_dir": "x"}, "unknown option"),
        ({"port": "http"}, "port"),
        ({"port": 70000}, "port must be"),
        ({"max_connections": 0}, "max_connections must be positive"),
        ({"max_request_bytes": 1.5}, "max_request_bytes"),
        ({"drain_timeout_s": -1}, "drain_timeout_s"),
        ({"ssl_certfile": "x"}, "go together"),
        ({"ssl_ca_certs": "x"}, "ssl_ca_certs"),
        ({"tensor_parallel_size": 4}, "give one of them"),
        ({"top_p": 7}, "top_p"),
        ({"max_seq_len": 0}, "max_seq_len"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FrontConfig.from_options("a", 2, options)


def test_a_certificate_that_cannot_be_read() -> None:
    config = FrontConfig.from_options("a", None, {"ssl_certfile": "/nowhere/c", "ssl_keyfile": "/nowhere/k"})
    with pytest.raises(ConfigError, match="ssl_certfile"):
        make_server(None, config)  # type: ignore[arg-type]


def test_a_port_in_use() -> None:
    with listen("127.0.0.1", 0) as first, pytest.raises(ConfigError, match="cannot listen"):
        listen("127.0.0.1", first.getsockname()[1])


def _lets_in(keys: ApiKeys, *given: str) -> list[bool]:
    return [keys.allow({"authorization": f"Bearer {key}"}) for key in given]


def test_keys_from_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfile-1\n\nfile-2\n")
    environment = {VARIABLE: "env-1"}
    keys = ApiKeys.read("a,b ,", str(file), environment)
    assert _lets_in(keys, "a", "b", "file-1", "file-2", "env-1") == [True] * 5
    assert _lets_in(keys, "", "c", "# ours", "file", "A") == [False] * 5
    assert environment == {}  # the ranks need not know
    assert not ApiKeys.read(None, None, {})


@pytest.mark.parametrize("place", ["api_key", "api_key_file", VARIABLE])
@pytest.mark.parametrize("keys", ["", " , ", "# none", "a b", "\xfc"])
def test_a_place_without_a_good_key_does_not_open_the_door(tmp_path: Path, place: str, keys: str) -> None:
    file = tmp_path / "keys"
    file.write_text(keys)
    with pytest.raises(ConfigError, match=place):
        ApiKeys.read(
            keys if place == "api_key" else None,
            str(file) if place == "api_key_file" else None,
            {VARIABLE: keys} if place == VARIABLE else {},
        )


def test_a_file_of_keys_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="api_key_file"):
        ApiKeys.read(None, "/nowhere/keys", {})

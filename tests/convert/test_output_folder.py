"""A conversion that is killed, terminated, out of space or raced leaves nothing half-made, and the source as it was."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.shards import write_fairscale_checkpoint
from tpserve.convert import manifest
from tpserve.convert.convert import convert
from tpserve.convert.errors import ConvertError
from tpserve.convert.manifest import HashedFile, verify_manifest
from tpserve.convert.output_folder import new_folder

Snapshot = Callable[[Path], dict[str, str]]

# Converts argv[1] to argv[2]; when the tenth chunk is about to be written, the statement in argv[3] is run.
_SCRIPT = """
import os, resource, signal, sys
from tpserve.convert import dcp_writer
from tpserve.convert.__main__ import run
save, count = dcp_writer._torch_save, 0
def interrupted(data, file):
    global count
    count += 1
    if count == 10:
        exec(sys.argv[3])
    save(data, file)
dcp_writer._torch_save = interrupted
run(sys.argv[1], sys.argv[2])
"""


def convert_and(statement: str, ckpt: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _SCRIPT, str(ckpt), str(out), statement]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_kill_9_in_the_middle_then_a_clean_rerun(ckpt: Path, tmp_path: Path, snapshot: Snapshot) -> None:
    before, out = snapshot(ckpt), tmp_path / "out"
    killed = convert_and("os.kill(os.getpid(), signal.SIGKILL)", ckpt, out)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert [p.name.partition("-")[0] for p in tmp_path.glob(".out*")] == [".out.partial"]
    assert convert(ckpt, out, progress=False) == out
    verify_manifest(out)
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}
    assert snapshot(ckpt) == before


@pytest.mark.parametrize(
    ("statement", "returncode", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGTERM)", 128 + signal.SIGTERM, ""),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))", 2, "error: the disk is full (File too large)"),
        ("raise OSError(5, 'Input/output error')", 2, "Input/output error; nothing was left behind"),
    ],
    ids=["sigterm", "ctrl-c", "file-size-limit", "disk-error"],
)
def test_interrupted_conversion_tidies_up(
    ckpt: Path, tmp_path: Path, snapshot: Snapshot, statement: str, returncode: int, said: str
) -> None:
    before = snapshot(ckpt)
    ended = convert_and(statement, ckpt, tmp_path / "out")
    assert ended.returncode == returncode, ended.stderr
    assert said in ended.stderr
    assert ("Traceback" in ended.stderr) == (said == "KeyboardInterrupt")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    assert snapshot(ckpt) == before


@pytest.mark.parametrize("full_after_bytes", [0, 1000, 20_000, 80_000, 95_000])
def test_full_disk_in_the_middle(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot, full_after_bytes: int
) -> None:
    before, written, write = snapshot(ckpt), 0, HashedFile.write

    def write_until_full(self: HashedFile, data: bytes | memoryview) -> int:
        nonlocal written
        was, written = written, written + len(data)
        if was <= full_after_bytes < written:  # once: whoever overlooks it goes on and finishes
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(manifest.HashedFile, "write", write_until_full)
    with pytest.raises(ConvertError, match=r"the disk is full .* while writing .*/out; nothing was left behind"):
        convert(ckpt, tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    assert snapshot(ckpt) == before


def test_too_little_space_is_told_before_the_first_byte(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConvertError, match=r"has 0 MiB free \(100,000 bytes\), the converted checkpoint needs 1 MiB"):
        convert(ckpt, tmp_path / "new" / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_parents_are_made_and_an_empty_folder_is_filled(ckpt: Path, tmp_path: Path) -> None:
    assert convert(ckpt, tmp_path / "a" / "b" / "out", progress=False).is_dir()
    (tmp_path / "empty").mkdir()
    verify_manifest(convert(ckpt, tmp_path / "empty", progress=False))


def test_what_is_there_is_never_touched(ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConvertError, match="out is not empty"):
        convert(ckpt, tmp_path / "out", progress=False)
    with pytest.raises(ConvertError, match="file is a file"):
        convert(ckpt, tmp_path / "file", progress=False)
    with pytest.raises(ConvertError, match="llama-tiny is not empty"):
        convert(ckpt, ckpt, progress=False)
    assert (tmp_path / "out" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"


def test_a_mount_point_is_refused_at_once(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(ConvertError, match="out is a mount point"):
        convert(ckpt, tmp_path / "out", progress=False)


def test_of_two_at_once_the_second_is_told(ckpt: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as first:
        (first / "weights").write_text("first")
        with pytest.raises(ConvertError, match=f"another conversion .process {os.getpid()}. is writing"):
            convert(ckpt, out, progress=False)
    assert [p.name for p in out.iterdir()] == ["weights"]


def test_of_two_that_end_together_one_wins(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def lose() -> None:
        with new_folder(out) as second:
            (second / "weights").write_text("second")
            out.mkdir()  # the other one's rename
            (out / "weights").write_text("first")

    with pytest.raises(ConvertError, match="was written by another conversion in the meantime"):
        lose()
    assert (out / "weights").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_leftovers_of_the_dead_are_removed(ckpt: Path, tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    names = [f".out.partial-{int(dead.stdout)}", f".out.partial-{os.getpid()}"]
    kept = [f".out.partial-{os.getppid()}", ".out.partial-x", ".other.partial-1", "out.partial-1"]
    for name in names + kept:
        (tmp_path / name).mkdir()
    convert(ckpt, tmp_path / "out", progress=False)
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out", *kept}


def test_a_file_in_the_way(ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConvertError, match="file cannot be written: File exists"):
        convert(ckpt, tmp_path / "file" / "out", progress=False)


def test_sigterm_is_left_alone_afterwards(tmp_path: Path) -> None:
    write_fairscale_checkpoint(tmp_path / "in")
    before = signal.getsignal(signal.SIGTERM)
    convert(tmp_path / "in", tmp_path / "out", progress=False)
    assert signal.getsignal(signal.SIGTERM) is before

"""A disk that is full, and several conversions at once: one whole folder or none, and what was there stays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.shards import TINY_PARAMS, write_fairscale_checkpoint
from tpserve.convert import convert as convert_module
from tpserve.convert.convert import convert
from tpserve.convert.errors import ConvertError
from tpserve.convert.manifest import verify_manifest
from tpserve.model.loader import load_model


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("only root may mount a small tmpfs; test_output_folder.py fills the disk without one")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_fairscale_checkpoint(tmp_path / "in", TINY_PARAMS | {"dim": 128, "n_layers": 3})  # 3 MB
    return tmp_path / "in"


def test_a_small_disk_is_refused_before_the_first_byte(source: Path, small_disk: Path) -> None:
    (small_disk / "mine").write_text("mine")
    with pytest.raises(ConvertError) as error:
        convert(source, small_disk / "new" / "out", progress=False)
    found = re.search(r"disk has 0 MiB free \(([\d,]+) bytes\), .* needs (\d) MiB \(([\d,]+) bytes\)", str(error.value))
    assert found, error.value
    free_bytes, needed_bytes = (int(found[i].replace(",", "")) for i in (1, 3))
    assert free_bytes < 256 << 10 < needed_bytes
    assert [p.name for p in small_disk.iterdir()] == ["mine"]


def test_a_disk_that_fills_up_meanwhile(source: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small_disk / "mine").write_text("mine")
    (small_disk / "out").mkdir()
    monkeypatch.setattr(convert_module, "check_disk_space", lambda *_: None)
    with pytest.raises(ConvertError, match=r"disk is full .*out; nothing was left behind; .* free .* needs \d MiB"):
        convert(source, small_disk / "out", progress=False)
    assert sorted(p.name for p in small_disk.rglob("*")) == ["mine", "out"]
    assert (small_disk / "mine").read_text() == "mine"


# Four processes of one parent, which has imported everything: they begin together.
_AT_ONCE = """
import os, sys
from tpserve.convert.__main__ import run
begin_r, begin_w = os.pipe()
children = []
for i in range(4):
    pid = os.fork()
    if pid == 0:
        os.close(begin_w)
        os.read(begin_r, 1)
        status = 1
        try:
            run(sys.argv[1 + i % 2], sys.argv[3])
            status = 0
        except SystemExit as e:
            status = e.code
        finally:
            sys.stderr.flush()
            os._exit(status)
    children.append(pid)
os.close(begin_r)
os.close(begin_w)
print(sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
"""


def test_of_several_conversions_at_once_one_wins(tmp_path: Path) -> None:
    write_fairscale_checkpoint(tmp_path / "in0", seed=0)
    write_fairscale_checkpoint(tmp_path / "in1", seed=1)
    arguments = [str(tmp_path / name) for name in ("in0", "in1", "out")]
    done = subprocess.run(
        [sys.executable, "-c", _AT_ONCE, *arguments], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout == "[0, 2, 2, 2]\n", done.stderr
    errors = done.stderr.split("error: ")[1:]  # several processes write: two may end up in one line
    assert len(errors) == 3
    for error in errors:
        assert re.search(r"another conversion|out is not empty", error), error
    assert "Traceback" not in done.stderr
    verify_manifest(tmp_path / "out")
    load_model(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in0", "in1", "out"]

"""What the loader refuses, and that it executes nothing a file contains."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.shards import write_fairscale_checkpoint
from tpserve.convert.convert import convert
from tpserve.model.checkpoint import CheckpointError, CheckpointInfo
from tpserve.model.loader import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_fairscale_checkpoint(tmp_path / "in")
    return convert(tmp_path / "in", tmp_path / "out", progress=False)


def test_weights_arrive_in_the_asked_dtype(folder: Path, tmp_path: Path) -> None:
    weights = write_fairscale_checkpoint(tmp_path / "same")
    for dtype in (None, torch.float32, torch.bfloat16):
        loaded = load_model(folder, dtype=dtype)
        assert loaded.dtype == (dtype or torch.float32)
        state = loaded.model.state_dict()
        assert state.keys() == weights.keys()
        for name, weight in weights.items():
            assert torch.equal(state[name], weight.to(loaded.dtype)), name
        assert loaded.bytes_read == sum(w.nbytes for w in weights.values())
        assert not any(p.requires_grad for p in loaded.model.parameters())


def test_dummy_weights_need_no_files(folder: Path, tmp_path: Path) -> None:
    CheckpointInfo.read(folder).write(tmp_path)
    a, b = (load_model(tmp_path, dummy=True).model for _ in range(2))
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
        assert x.isfinite().all()
        assert x.ndim == 1 or x.std() > 0.01, name


class Evil:
    """Unpickled freely, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "owned"))


def test_metadata_that_is_a_program_is_not_run(folder: Path, tmp_path: Path) -> None:
    victim = tmp_path / "owned"
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(victim)))
    with pytest.raises(CheckpointError, match=r"\.metadata.*no place in checkpoint metadata"):
        load_model(folder)
    assert not victim.exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"<html>", pickle.dumps({"a": 1})])
def test_metadata_that_is_something_else(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        load_model(folder)


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "other"])
def test_a_damaged_layer_file_is_named(folder: Path, how: str) -> None:
    path = next(p for p in folder.glob("*layers.1*"))
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "other": b"x" * len(data)}[how])
    with pytest.raises(CheckpointError, match=r"layers\.1.*convert the checkpoint again"):
        load_model(folder)


def test_a_folder_that_lacks_a_tensor(folder: Path) -> None:
    info = json.loads((folder / "model.json").read_text())
    info["args"]["n_layers"] += 1
    (folder / "model.json").write_text(json.dumps(info))
    with pytest.raises(CheckpointError, match=r"lacks layers\.2"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format|tpserve-dcp"),
        ({"version": 2}, "version 2"),
        ({"dtype": "int8"}, "int8"),
        ({"tokenizer": "../../etc/passwd"}, "file name"),
        ({"args": {"dim": 3}}, "model.json"),
    ],
)
def test_a_wrong_model_file(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        CheckpointInfo.read(folder)


def test_an_unconverted_folder_says_what_to_do(tmp_path: Path) -> None:
    write_fairscale_checkpoint(tmp_path / "in")
    with pytest.raises(CheckpointError, match="tpserve convert --ckpt_dir"):
        load_model(tmp_path / "in")

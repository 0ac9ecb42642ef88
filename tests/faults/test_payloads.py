"""A pickle that would make a folder, in every file of a checkpoint and by every way in: the folder is not made."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.faults.checkpoints import (
    LAYER,
    Call,
    dotted,
    edit_metadata,
    hostile_tensor,
    make,
    put_into_archive,
    put_into_chunk,
    sign,
)
from tpserve.convert.convert import convert
from tpserve.convert.errors import ConvertError
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError
from tpserve.engine.group import build_core
from tpserve.engine.text.load import checkpoint_tokenizer
from tpserve.engine.text.tokenizer import TokenizerError
from tpserve.handler.archive import archive
from tpserve.model.checkpoint import CheckpointError
from tpserve.model.parallel import TensorParallel

S0, S1 = "consolidated.00.pth", "consolidated.01.pth"
DCP = "torch.distributed.checkpoint"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("sound"))


def in_metadata(folder: Path, victim: Path) -> None:
    """In a place of sound metadata that nobody looks at."""
    edit_metadata(folder, lambda m: m.planner_data.update(more=Call(victim)))


# where the payload is → how it gets there; the last part of the name is the file
FOLDERS: dict[str, Callable[[Path, Path], object]] = {
    "alone in .metadata": lambda d, v: (d / ".metadata").write_bytes(pickle.dumps(Call(v))),
    "within .metadata": in_metadata,
    "dotted, metadata, in .metadata": lambda d, v: (d / ".metadata").write_bytes(dotted(v, f"{DCP}.metadata")),
    "dotted, filesystem, in .metadata": lambda d, v: (d / ".metadata").write_bytes(dotted(v, f"{DCP}.filesystem")),
    "torch.save as .metadata": lambda d, v: (d / ".metadata").write_bytes(hostile_tensor(v)),
    f"alone in {LAYER}": lambda d, v: (d / LAYER).write_bytes(pickle.dumps(Call(v))),
    f"torch.save as {LAYER}": lambda d, v: (d / LAYER).write_bytes(hostile_tensor(v)),
    "tokenizer.model": lambda d, v: (d / "tokenizer.model").write_bytes(pickle.dumps(Call(v))),
    "model.json": lambda d, v: (d / "model.json").write_bytes(pickle.dumps(Call(v))),
    "manifest.json": lambda d, v: (d / "manifest.json").write_bytes(pickle.dumps(Call(v))),
}


def config(folder: Path) -> EngineConfig:
    return EngineConfig(
        checkpoint_dir=str(folder), device="cpu", max_seq_len=32, max_num_seqs=2, max_num_batched_tokens=32,
        fused_kernels=False,
    )  # fmt: skip


def ways(folder: Path, scratch: Path) -> list[Callable[[], object]]:
    """What reads a converted folder: ranks, offline generation (the same), the fronts, the archiver."""
    return [
        lambda: build_core(config(folder), torch.device("cpu"), TensorParallel()),
        lambda: EngineClient(config(folder)),
        lambda: checkpoint_tokenizer(folder),
        lambda: archive(folder, export_path=scratch / "store"),
        lambda: convert(folder, scratch / "out", progress=False),
    ]


@pytest.mark.parametrize("signed", [False, True], ids=["", "signed"])
@pytest.mark.parametrize("place", FOLDERS)
def test_a_folder_with_a_payload(place: str, signed: bool, made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, victim = Path(shutil.copytree(made[1], tmp_path / "model")), tmp_path / "executed"
    FOLDERS[place](folder, victim)
    if signed and "manifest" not in place and "metadata" not in place:  # to read it would be to execute it
        sign(folder)
    refusals = []
    for way in ways(folder, tmp_path)[: 5 if place == "model.json" else 3]:
        try:
            way()
        except (CheckpointError, ConfigError, ConvertError, TokenizerError) as e:
            refusals.append(str(e))
    assert not victim.exists()
    assert place.rpartition(" ")[2] in refusals[0], refusals


def test_a_payload_in_a_chunk_that_the_manifest_vouches_for_is_never_read(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, victim = Path(shutil.copytree(made[1], tmp_path / "model")), tmp_path / "executed"
    put_into_chunk(folder, pickle.dumps(Call(victim)))
    build_core(config(folder), torch.device("cpu"), TensorParallel())  # the weights are what they were
    assert not victim.exists()


def test_a_payload_in_a_chunk_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, victim = Path(shutil.copytree(made[1], tmp_path / "model")), tmp_path / "executed"
    manifest = (folder / "manifest.json").read_bytes()
    put_into_chunk(folder, pickle.dumps(Call(victim)))
    (folder / "manifest.json").write_bytes(manifest)
    with pytest.raises(CheckpointError, match=r"again"):
        build_core(config(folder), torch.device("cpu"), TensorParallel())
    assert not victim.exists()


SOURCES: dict[str, Callable[[Path, Path], object]] = {
    f"a weight of {S1}": lambda d, v: torch.save({"w": Call(v)}, d / S1),
    f"alone in {S1}": lambda d, v: (d / S1).write_bytes(pickle.dumps(Call(v))),
    f"dotted in {S1}": lambda d, v: put_into_archive(d / S1, dotted(v, "torch.serialization")),
    f"of old torch in {S1}": lambda d, v: torch.save({"w": Call(v)}, d / S1, _use_new_zipfile_serialization=False),
    "params.json": lambda d, v: (d / "params.json").write_bytes(pickle.dumps(Call(v))),
    "tokenizer.model": lambda d, v: (d / "tokenizer.model").write_bytes(pickle.dumps(Call(v))),
    "checklist.chk": lambda d, v: (d / "checklist.chk").write_bytes(pickle.dumps(Call(v))),
}


@pytest.mark.parametrize("place", SOURCES)
def test_shards_with_a_payload(place: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    source, victim = Path(shutil.copytree(made[0], tmp_path / "source")), tmp_path / "executed"
    SOURCES[place](source, victim)
    with pytest.raises(ConvertError, match=place.rpartition(" ")[2].replace(".", r"\.")):
        convert(source, tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_the_server_refuses_and_executes_nothing(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, victim = Path(shutil.copytree(made[1], tmp_path / "model")), tmp_path / "executed"
    (folder / ".metadata").write_bytes(dotted(victim, f"{DCP}.filesystem"))
    code = "from tpserve.cli.main import main; main()"
    options = ["--device", "cpu", "--port", "0", "--max_seq_len", "32", "--max_num_seqs", "2"]
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "--checkpoint", str(folder), *options],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for words in (".metadata", "os.mkdir has no place in checkpoint metadata", "convert the checkpoint again"):
        assert words in last
    assert not victim.exists()

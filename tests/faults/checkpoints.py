"""Checkpoints that somebody has done something to, and pickles that would make a folder."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from tests.helpers.shards import TINY_PARAMS, write_fairscale_checkpoint
from tests.text.models import load, tiny_model
from tpserve.convert.convert import convert
from tpserve.model.loader import load_model

PARAMS = TINY_PARAMS | {"vocab_size": 384}
LAYER = "layers.1.distcp"


def make(folder: Path, seed: int = 0, **fields: Any) -> tuple[Path, Path]:
    """A two-shard Fairscale checkpoint with a tokenizer, and what it is converted to."""
    assert load(tiny_model()).vocab_size <= PARAMS["vocab_size"]
    write_fairscale_checkpoint(folder / "in", PARAMS | fields, seed=seed)
    shutil.copy(tiny_model(), folder / "in" / "tokenizer.model")
    return folder / "in", convert(folder / "in", folder / "out", progress=False)


def weights_digest(folder: Path) -> str:
    """Of what a rank would compute with."""
    digest = hashlib.sha256()
    for name, weight in load_model(folder).model.state_dict().items():
        digest.update(name.encode() + weight.contiguous().numpy().tobytes())
    return digest.hexdigest()


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def exchange(folder: Path, a: str, b: str) -> None:
    (folder / a).rename(folder / "between")
    (folder / b).rename(folder / a)
    (folder / "between").rename(folder / b)


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_metadata(folder: Path, change: Any) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    assert isinstance(metadata, Metadata)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def sign(folder: Path) -> None:
    """Makes the manifest true, as whoever can write the folder may."""
    manifest = json.loads((folder / "manifest.json").read_text())
    storage = pickle.loads((folder / ".metadata").read_bytes()).storage_data
    for name in manifest["sha256"]:
        data = (folder / name).read_bytes()
        manifest["sha256"][name], manifest["bytes"][name] = hashlib.sha256(data).hexdigest(), len(data)
        for where in storage.values():
            if where.relative_path == name:
                crc = zlib.crc32(data[where.offset :][: where.length])
                manifest["crc32"][name][str(where.offset)] = f"{crc:08x}"
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Call:
    """Unpickled, it calls os.mkdir."""

    def __init__(self, victim: Path) -> None:
        self.victim = str(victim)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.victim,)


def dotted(victim: Path, module: str) -> bytes:
    """A pickle that reaches os.mkdir through a module that imports os."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value.encode())]) + value.encode()

    path = str(victim).encode()
    argument = b"X" + len(path).to_bytes(4, "little") + path
    return b"\x80\x04" + text(module) + text("os.mkdir") + b"\x93" + argument + b"\x85R."


def put_into_archive(path: Path, payload: bytes) -> None:
    """The data.pkl of a torch.save file becomes `payload`; all sums are right."""
    with zipfile.ZipFile(path) as old:
        records = [(info.filename, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, data in records:
            new.writestr(name, payload if name.endswith("/data.pkl") else data)


def put_into_chunk(folder: Path, payload: bytes) -> None:
    """The first chunk of a layer becomes a torch.save file whose pickle is `payload`; its data stay."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    path = folder / LAYER
    index, where = next((i, w) for i, w in metadata.storage_data.items() if w.relative_path == LAYER and w.offset == 0)
    data = path.read_bytes()
    item = folder.parent / "item"
    item.write_bytes(data[: where.length])
    put_into_archive(item, payload)
    shift = item.stat().st_size - where.length
    path.write_bytes(item.read_bytes() + data[where.length :])
    item.unlink()
    for other in metadata.storage_data.values():
        if other.relative_path == LAYER and other.offset:
            other.offset += shift
    metadata.storage_data[index].length += shift
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["crc32"][LAYER] = {}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    sign(folder)


def hostile_tensor(victim: Path) -> bytes:
    """What `torch.save` makes of a payload."""
    path = victim.parent / "hostile.pt"
    torch.save({"w": Call(victim)}, path)
    data = path.read_bytes()
    path.unlink()
    return data

"""Metadata as Python 3.11.0 to 3.11.3 pickles it: a member of an enum is a `getattr` there."""

from __future__ import annotations

import enum
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from tpserve.convert.inert_pickle import dcp_tensor
from tpserve.model.checkpoint import CheckpointError
from tpserve.model.dcp_reader import MmapReader


class OldPickler(pickle.Pickler):
    def reducer_override(self, thing: Any) -> Any:
        return (getattr, (type(thing), thing.name)) if isinstance(thing, enum.Enum) else NotImplemented


class Call:
    """Something else that `getattr` gets."""

    def __reduce__(self) -> Any:
        return getattr, (Path, "unlink")


def written(folder: Path, thing: Any) -> Path:
    file = io.BytesIO()
    OldPickler(file, protocol=4).dump(thing)
    assert b"getattr" in file.getvalue()
    (folder / ".metadata").write_bytes(file.getvalue())
    return folder / ".metadata"


def test_it_is_read(tmp_path: Path) -> None:
    size = torch.Size([3, 2])
    properties = TensorProperties(dtype=torch.bfloat16, memory_format=torch.channels_last)
    tensor = TensorStorageMetadata(properties, size, [ChunkStorageMetadata(torch.Size([0, 0]), size)])
    path = written(tmp_path, Metadata({"w": tensor}))
    assert MmapReader(tmp_path).read_metadata().state_dict_metadata["w"] == tensor
    found = dcp_tensor(path, "w")
    assert (found.shape, found.dtype) == ((3, 2), "bfloat16")


def test_getattr_of_anything_else_is_refused(tmp_path: Path) -> None:
    written(tmp_path, Metadata({}, planner_data=Call()))
    with pytest.raises(CheckpointError, match=r"builtins\.getattr has no place"):
        MmapReader(tmp_path).read_metadata()

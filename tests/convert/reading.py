"""A converted folder as plain PyTorch reads it."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor


def metadata(out: Path) -> Any:
    return pickle.loads((out / ".metadata").read_bytes())


def load_stock(folder: Path, like: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Loads a folder with plain PyTorch into tensors shaped like `like`, filled with rubbish first."""
    state = {name: torch.full_like(t, 7, dtype=dtype or t.dtype) for name, t in like.items()}
    for name, t in state.items():  # loading would cast silently
        assert metadata(folder).state_dict_metadata[name].properties.dtype == t.dtype
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "torch.distributed is disabled", UserWarning
        )  # it is said even when asked for
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return state


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def stored_item(out: Path, info: Any, tmp_path: Path) -> Tensor:
    (tmp_path / "item").write_bytes((out / info.relative_path).read_bytes()[info.offset :][: info.length])
    item = torch.load(tmp_path / "item", mmap=True, weights_only=True)
    assert isinstance(item, Tensor)
    return item

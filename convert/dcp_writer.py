"""Writes a checkpoint in the format of PyTorch Distributed Checkpoint (DCP), one chunk in memory at a time.

`dcp.save` would keep every tensor of an open file alive until the file is closed, and wraps the errors of the disk in
its own. The format itself is small: files of `torch.save` streams, and one pickled `Metadata` that says which chunk of
which tensor lies where. `torch.distributed.checkpoint.FileSystemReader` reads it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from tpserve.convert.manifest import HashedFile, Manifest
from tpserve.convert.weights import Weight, layer_of, read_slab, stored_dtype
from tpserve.model.safetensors_reader import stored_chunks

METADATA_FILE = ".metadata"
_DCP_VERSION = "1.0.0"
# Upper bound of what a torch.save stream and its entry in .metadata add to a chunk's own bytes.
ITEM_OVERHEAD_BYTES = 4096


def write_dcp(
    folder: Path,
    tensors: Iterable[Weight],
    dtype: torch.dtype,
    manifest: Manifest,
    on_bytes: Callable[[int], object] = lambda n: None,
) -> None:
    """Writes one `.distcp` file a layer, and `.metadata`.

    Args:
        folder: an empty folder.
        tensors: in an order that keeps the parameters of a layer together.
        dtype: of the stored weights that have none of their own.
        manifest: is told of every file.
        on_bytes: called with the size of every chunk once it is written.

    Raises:
        ConvertError: a weight does not fit into `dtype`; the message names it.
        OSError: of the disk.
    """
    state: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for layer, members in groupby(tensors, key=lambda t: layer_of(t.name)):
        file_name = f"{layer}.distcp"
        with HashedFile(folder / file_name) as file:
            for tensor in members:
                dim, bounds = stored_chunks(tensor.name, tensor.shape)
                pieces = []
                for index, (lo, hi) in enumerate(bounds):
                    data = read_slab(tensor, dim, lo, hi, stored_dtype(tensor, dtype))
                    offset = file.position
                    file.begin_chunk()
                    _torch_save(data, file)
                    on_bytes(data.nbytes)
                    begin = torch.Size(lo if d == dim else 0 for d in range(data.ndim))
                    pieces.append(ChunkStorageMetadata(begin, data.shape))
                    del data  # before the next chunk is read
                    key = MetadataIndex(tensor.name, begin, index)
                    storage[key] = _StorageInfo(file_name, offset, file.position - offset)
                state[tensor.name] = TensorStorageMetadata(
                    TensorProperties(dtype=stored_dtype(tensor, dtype)), torch.Size(tensor.shape), pieces
                )
        manifest.add(file_name, file)
    metadata = Metadata(
        state_dict_metadata=dict(state),
        planner_data={name: (name,) for name in state},
        storage_data=storage,
        storage_meta=StorageMeta(),
        version=_DCP_VERSION,
    )
    manifest.write_bytes(METADATA_FILE, pickle.dumps(metadata))


class _Sink:
    """What `torch.save` writes to. An error raised through its C++ writer would come out as another: it is kept."""

    def __init__(self, file: HashedFile) -> None:
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: bytes | memoryview) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except BaseException as e:  # noqa: BLE001 - raised by _torch_save, KeyboardInterrupt included
                self.error = e
        return len(data)

    def flush(self) -> None:
        """`torch.save` calls it at the end; nothing is buffered."""


def _torch_save(data: torch.Tensor, file: HashedFile) -> None:
    sink = _Sink(file)
    torch.save(data, sink)  # type: ignore[arg-type]  # asks for IO[bytes], uses write and flush
    if sink.error is not None:
        raise sink.error

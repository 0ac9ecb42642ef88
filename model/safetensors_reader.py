"""Reads slices of a folder of one `.safetensors` file a layer, as `MmapReader` does of DCP's; nothing is pickled.

Format: 8 bytes of length, a JSON header {name: {"dtype", "shape", "data_offsets"}}, then each tensor's bytes in row
order (https://huggingface.co/docs/safetensors). To the planner a tensor looks as it would in DCP, 8 chunks along its TP
dimension: each has a CRC-32 in the manifest, under the offset of its first byte.
"""

from __future__ import annotations

import json
import mmap
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

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

from tpserve.model.checkpoint import CheckpointError
from tpserve.model.dcp_reader import MmapReader
from tpserve.model.manifest import StoredManifest
from tpserve.model.mapped import pieces
from tpserve.model.plan import chunk_bounds, tp_dim

N_CHUNKS = 8
DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
_MAX_HEADER_BYTES = 16 << 20  # of a layer it is one kilobyte
_BLOCK_BYTES = 4 << 20


def stored_chunks(name: str, shape: tuple[int, ...]) -> tuple[int, list[tuple[int, int]]]:
    """The dimension along which a parameter is cut for storage, and the half-open bounds of its chunks.

    It is the dimension along which the parameter is split over ranks. Replicated matrices are cut along dimension 0,
    only to bound memory; vectors are not cut.

    Raises:
        KeyError: no Llama has a parameter of that name.
    """
    dim = tp_dim(name)
    if dim is not None:
        return dim, chunk_bounds(shape[dim], N_CHUNKS)
    return 0, chunk_bounds(shape[0], N_CHUNKS if len(shape) > 1 else 1)


def open_reader(folder: Path, manifest: StoredManifest | None) -> MmapReader:
    """The reader of this folder's form.

    Args:
        folder: of the checkpoint.
        manifest: see `MmapReader`.
    """
    if not (folder / ".metadata").exists() and any(folder.glob("*.safetensors")):
        return SafetensorsReader(folder, manifest)
    return MmapReader(folder, manifest)


class SafetensorsReader(MmapReader):
    """See the top of this file; arguments and attributes are `MmapReader`'s."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Reads the headers of all files.

        Raises:
            CheckpointError: one is damaged, or holds something else than the weights of a Llama.
        """
        if self._metadata is not None:
            return self._metadata
        self._starts: dict[str, int] = {}  # of each tensor in its file, in bytes
        tensors: dict[str, Any] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                header_bytes, header = read_header(path)
                for name, entry in header.items():
                    dtype, shape = DTYPES[entry["dtype"]], torch.Size(entry["shape"])
                    begin, end = entry["data_offsets"]
                    if end - begin != shape.numel() * dtype.itemsize or begin < 0 or name in tensors:
                        raise ValueError(f"the entry of {name} contradicts itself")
                    self._starts[name] = start = header_bytes + begin
                    dim, bounds = stored_chunks(name, tuple(shape))
                    stride = shape[dim + 1 :].numel() * dtype.itemsize
                    chunks = []
                    for i, (lo, hi) in enumerate(bounds):
                        offset = torch.Size(lo if d == dim else 0 for d in range(len(shape)))
                        sizes = torch.Size(hi - lo if d == dim else n for d, n in enumerate(shape))
                        chunks.append(ChunkStorageMetadata(offset, sizes))
                        # From its first byte to its last; other chunks' bytes lie between them when dim is not 0.
                        first = start + lo * stride
                        length = ((hi - lo) if dim == 0 else (shape[0] - 1) * shape[dim] + hi - lo) * stride
                        storage[MetadataIndex(name, offset, i)] = _StorageInfo(path.name, first, length)
                    tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks)
            except CheckpointError:
                raise
            except Exception as e:  # noqa: BLE001 - a damaged header can hold anything
                reason = f"{type(e).__name__}: {e}" if isinstance(e, KeyError) else str(e)
                raise CheckpointError(f"{path} is damaged or no file of weights ({reason}); copy it again") from None
        self._metadata = Metadata(tensors, {name: (name,) for name in tensors}, storage, StorageMeta())
        return self._metadata

    def view(self, data: mmap.mmap, index: MetadataIndex) -> torch.Tensor:
        """The stored chunk as a tensor over the mapped bytes."""
        tensor = self._tensor(index)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            whole = torch.frombuffer(
                data, dtype=tensor.properties.dtype, count=tensor.size.numel(), offset=self._starts[index.fqn]
            )
        whole = whole.view(tensor.size)
        chunk = next(c for c in tensor.chunks if c.offsets == index.offset)
        for dim, (offset, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            whole = whole.narrow(dim, offset, length)
        return whole

    def _tensor(self, index: MetadataIndex) -> TensorStorageMetadata:
        assert self._metadata is not None, "DCP reads the metadata first"
        tensor = self._metadata.state_dict_metadata[index.fqn]
        assert isinstance(tensor, TensorStorageMetadata)
        return tensor

    def _crc32(self, data: mmap.mmap, index: MetadataIndex) -> int:
        chunk = self.view(data, index)
        if chunk.is_contiguous():
            return super()._crc32(data, index)
        # Columns: a block of rows is fetched whole, its columns gathered, and its pages given back.
        first, row_bytes = self._starts[index.fqn], chunk.stride(0) * chunk.element_size()
        rows, crc = max(1, _BLOCK_BYTES // row_bytes), 0
        for lo in range(0, chunk.shape[0], rows):
            block = chunk[lo : lo + rows]
            begin, end = first + lo * row_bytes, first + (lo + block.shape[0]) * row_bytes
            for _ in pieces(data, begin, end):
                pass
            raw: Any = block.contiguous().view(torch.uint8).numpy()
            crc = zlib.crc32(raw, crc)
            page = begin // mmap.PAGESIZE * mmap.PAGESIZE
            data.madvise(mmap.MADV_DONTNEED, page, end - page)
        return crc


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a `.safetensors` file begin, in bytes, and its tensors' entries.

    Raises:
        CheckpointError: the file has no such header.
        OSError: of the disk.
    """
    with path.open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8).ljust(8, b"\xff"))
        if length > min(_MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise CheckpointError(f"{path} is truncated or no safetensors file; copy it again")
        try:
            header = json.loads(f.read(length))
        except (ValueError, RecursionError) as e:
            raise CheckpointError(f"{path} has a damaged header ({e}); copy it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header; copy it again")
    return 8 + length, {name: entry for name, entry in header.items() if name != "__metadata__"}

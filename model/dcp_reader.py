"""A DCP storage reader that touches only the bytes a rank needs, and executes nothing that the files contain.

The stock `FileSystemReader` unpickles `.metadata` freely and `torch.load`s every chunk that a rank touches, whole.
This one admits only the metadata's own classes, and views each stored tensor in place through mmap: an item is a
`torch.save` zip whose one record of data is stored uncompressed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import mmap
import pickle
import struct
import warnings
import zipfile
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from tpserve.model.checkpoint import CheckpointError
from tpserve.model.manifest import StoredManifest
from tpserve.model.mapped import Window, map_file, pieces
from tpserve.model.staged_copy import weight_threads

# Each by its name: a module has everything that it imports, and a pickle may ask for a dotted name in it (`os.system`).
_ALLOWED_NAMES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    # What torch before 2.3 called the tensor's properties; the old TorchServe example's folders hold them.
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
_LOCAL_FILE_HEADER_BYTES = 30  # of the zip format, before file name and extra field
_FILES_AHEAD = 2  # whose chunks are checked while another's are copied


def _member(kind: Any, name: str) -> Any:
    """What `getattr` is in metadata: Python 3.11.0 to 3.11.3 writes `getattr(Kind, "name")` for a member of an enum."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise pickle.UnpicklingError("builtins.getattr has no place in checkpoint metadata but for an enum's members")
    return kind[name]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        if (module, name) in _ALLOWED_NAMES or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in checkpoint metadata")


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A mapped file, and what is being done with what is wanted of it."""

    path: Path
    data: mmap.mmap
    items: list[tuple[ReadItem, futures.Future[None]]]


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Errors as `CheckpointError`s that name the file."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as e:  # noqa: BLE001 - a damaged file can make the readers of zip files raise anything
        reason = next(iter(str(e).splitlines()), "") or type(e).__name__
        raise CheckpointError(f"{path} is missing or damaged ({reason}); convert the checkpoint again") from None


class MmapReader(FileSystemReader):
    """Reads slices of a checkpoint written by `FileSystemWriter` (or ours) through mmap; keeps no map afterwards.

    Args:
        folder: of the checkpoint.
        manifest: what every chunk that is read is held against; None: nothing is.

    Attributes:
        manifest: see above.
        bytes_copied: of tensor data so far, in the stored dtype.
        copy: copies the second tensor, over mapped bytes, into the first.
        copies_by_threads: whether several threads had better call it.
    """

    def __init__(self, folder: Path, manifest: StoredManifest | None = None) -> None:
        super().__init__(folder)
        self._folder = folder
        self.manifest = manifest
        self._metadata: Metadata | None = None
        self.bytes_copied = 0
        self.copy: Callable[[torch.Tensor, torch.Tensor], object] = torch.Tensor.copy_
        self.copies_by_threads = False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Parses `.metadata`, once, with only its own classes allowed.

        Raises:
            CheckpointError: the file is missing, damaged, or holds anything else.
        """
        if self._metadata is not None:
            return self._metadata
        path = self._folder / ".metadata"
        try:
            with path.open("rb") as f:
                metadata = _MetadataUnpickler(f).load()
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; convert the checkpoint again") from None
        except Exception as e:  # noqa: BLE001 - a damaged pickle can raise anything
            raise CheckpointError(f"{path} is damaged or not metadata ({e}); convert the checkpoint again") from None
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path} is not DCP metadata; convert the checkpoint again")
        self._metadata = metadata
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies each planned slice into its target tensor, converting the dtype on the way.

        Raises:
            CheckpointError: a file is missing, damaged, or not the one that was written; the message names it.
        """
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            where = self.storage_data.get(item.storage_index)
            if where is None:
                raise CheckpointError(f"{self._folder / '.metadata'} does not say where {item.storage_index.fqn} is")
            by_file[where.relative_path].append(item)
        begun: deque[_Begun] = deque()
        with weight_threads(lone=self.copies_by_threads) as pool:
            for name, items in by_file.items():
                path = self._folder / name
                with _explained(path):
                    begun.append(self._begin(path, items, planner, pool))
                if len(begun) > _FILES_AHEAD:
                    self._end(begun.popleft(), planner)
            while begun:
                self._end(begun.popleft(), planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _begin(
        self, path: Path, items: list[ReadItem], planner: LoadPlanner, pool: futures.ThreadPoolExecutor
    ) -> _Begun:  # fmt: skip
        """Maps a file and has its chunks checked, and copied if threads do."""
        if path.parent != self._folder or not path.is_file():  # nor a pipe that would be waited for
            raise CheckpointError(f"{path} is no file of this checkpoint; convert the checkpoint again")
        if self.manifest is not None and path.name not in self.manifest.crc32:
            self.manifest.check_whole(path.name)
        data = map_file(path)

        def work(item: ReadItem) -> None:
            self.check(data, path, item.storage_index)
            if self.copies_by_threads:
                self._copy(data, path, item, planner)

        return _Begun(path, data, [(item, pool.submit(work, item)) for item in items])

    def _end(self, begun: _Begun, planner: LoadPlanner) -> None:
        """Waits for what has been begun; copies it, if threads do not."""
        with _explained(begun.path):
            for item, worked in begun.items:
                worked.result()
                if not self.copies_by_threads:
                    self._copy(begun.data, begun.path, item, planner)
                self.bytes_copied += item.lengths.numel() * self._stored_dtype(item).itemsize

    def _stored_dtype(self, item: ReadItem) -> torch.dtype:
        assert self._metadata is not None, "DCP reads the metadata first"
        tensor = self._metadata.state_dict_metadata[item.storage_index.fqn]
        assert isinstance(tensor, TensorStorageMetadata)
        return tensor.properties.dtype

    def check(self, data: mmap.mmap, path: Path, index: MetadataIndex) -> None:
        """Reads a stored chunk and holds it against the manifest; zlib lets other threads run meanwhile.

        Raises:
            CheckpointError: it is damaged, or not the one that was written.
        """
        where = self.storage_data[index]
        if not 0 <= where.offset <= where.offset + where.length <= len(data):
            raise CheckpointError(f"{path} ends before {index.fqn}; convert the checkpoint again")
        crc = self._crc32(data, index)
        if self.manifest is None or path.name not in self.manifest.crc32:
            return
        expected = self.manifest.crc32[path.name].get(where.offset)
        if crc != expected:
            said = "does not know it" if expected is None else f"says {expected:08x}"
            raise CheckpointError(
                f"{path} is damaged or belongs to another layer or model: the CRC-32 of {index.fqn} (byte "
                f"{where.offset}) is {crc:08x}, the manifest {said}; copy the folder again, or convert the checkpoint "
                f"again"
            )

    def _crc32(self, data: mmap.mmap, index: MetadataIndex) -> int:
        where, crc = self.storage_data[index], 0
        for begin, end in pieces(data, where.offset, where.offset + where.length):
            crc = zlib.crc32(memoryview(data)[begin:end], crc)
        return crc

    def _copy(self, data: mmap.mmap, path: Path, item: ReadItem, planner: LoadPlanner) -> None:
        stored = self.view(data, item.storage_index)
        for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            stored = stored.narrow(dim, offset, length)
        target = planner.resolve_tensor(item).detach()
        if target.shape != stored.shape:
            raise CheckpointError(
                f"{path}: {item.storage_index.fqn} is {tuple(stored.shape)}, not {tuple(target.shape)}"
            )
        self.copy(target, stored)
        planner.commit_tensor(item, target)

    def view(self, data: mmap.mmap, index: MetadataIndex) -> torch.Tensor:
        """The stored chunk as a tensor over the mapped bytes."""
        assert self._metadata is not None, "DCP reads the metadata first"
        tensor_metadata = self._metadata.state_dict_metadata[index.fqn]
        if not isinstance(tensor_metadata, TensorStorageMetadata):
            raise ValueError(f"{index.fqn} is not a tensor")
        where = self.storage_data[index]
        with zipfile.ZipFile(Window(data, where.offset, where.length)) as archive:
            record = next(i for i in archive.infolist() if i.filename.endswith("/data/0"))
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError("compressed tensor data")
        header = where.offset + record.header_offset
        name_bytes, extra_bytes = struct.unpack("<HH", data[header + 26 : header + _LOCAL_FILE_HEADER_BYTES])
        start = header + _LOCAL_FILE_HEADER_BYTES + name_bytes + extra_bytes
        chunk = next(c for c in tensor_metadata.chunks if c.offsets == index.offset)
        dtype, count = tensor_metadata.properties.dtype, chunk.sizes.numel()
        if record.file_size != count * dtype.itemsize:
            raise ValueError(f"{index.fqn} has {record.file_size} bytes, not {count * dtype.itemsize}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(data, dtype=dtype, count=count, offset=start).view(chunk.sizes)

"""A converted folder, DCP or safetensors, as something to convert from: any slab of any parameter."""

from __future__ import annotations

import dataclasses
import mmap
import threading
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from tpserve.convert.errors import ConvertError
from tpserve.convert.layout import format_shape, global_shape, parameter_names
from tpserve.model.args import ModelArgs
from tpserve.model.checkpoint import MODEL_FILE, CheckpointError, CheckpointInfo
from tpserve.model.dcp_reader import MmapReader
from tpserve.model.manifest import StoredManifest
from tpserve.model.mapped import map_file
from tpserve.model.quantized_format import Format, format_of
from tpserve.model.safetensors_reader import open_reader


class Files:
    """The mapped files of a folder; every chunk is held against the manifest when it is first read."""

    def __init__(self, folder: Path, reader: MmapReader) -> None:
        self._folder, self._reader = folder, reader
        self._maps: dict[str, mmap.mmap] = {}
        self._checked: set[MetadataIndex] = set()
        self._checks: dict[MetadataIndex, threading.Lock] = {}  # several threads may want slabs of a chunk

    def copy(self, index: MetadataIndex, dim: int, lo: int, hi: int, out: torch.Tensor) -> None:
        """Copies the slab [lo, hi) along `dim` of a stored chunk into `out`, and gives the file's pages back."""
        where = self._reader.storage_data[index]
        path = self._folder / where.relative_path
        try:
            if path.parent != self._folder or not path.is_file():  # nor a pipe that would be waited for
                raise CheckpointError(f"{path} is no file of this checkpoint")
            data = self._maps.get(path.name) or self._maps.setdefault(path.name, map_file(path))
            with self._checks.setdefault(index, threading.Lock()):
                if index not in self._checked:
                    self._reader.check(data, path, index)
                    self._checked.add(index)
            out.copy_(self._reader.view(data, index).narrow(dim, lo, hi - lo))
        except CheckpointError as e:
            raise ConvertError(str(e)) from None
        except Exception as e:  # noqa: BLE001 - a damaged file can make the readers of zip files raise anything
            reason = next(iter(str(e).splitlines()), "") or type(e).__name__
            raise ConvertError(f"{path} is missing or damaged ({reason})") from None
        begin = where.offset // mmap.PAGESIZE * mmap.PAGESIZE
        data.madvise(mmap.MADV_DONTNEED, begin, where.offset + where.length - begin)


@dataclasses.dataclass(frozen=True)
class DcpTensor:
    """One parameter of a converted folder.

    Attributes:
        name: Meta's name.
        shape: of the whole parameter.
        stored: as DCP's metadata describe it.
    """

    name: str
    shape: tuple[int, ...]
    stored: TensorStorageMetadata
    _files: Files

    def read(self, dim: int, lo: int, hi: int, dtype: torch.dtype) -> torch.Tensor:
        """Copies the slab [lo, hi) along `dim` into a new contiguous tensor of `dtype`.

        Raises:
            ConvertError: a file is missing or damaged; the message names it.
        """
        sizes = list(self.shape)
        sizes[dim] = hi - lo
        out, filled = torch.empty(sizes, dtype=dtype), 0
        for i, chunk in enumerate(self.stored.chunks):
            first, size = chunk.offsets[dim], chunk.sizes[dim]
            begin, end = max(lo, first), min(hi, first + size)
            if begin >= end:
                continue
            target = out
            for d, (offset, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                target = target.narrow(d, begin - lo, end - begin) if d == dim else target.narrow(d, offset, length)
            self._files.copy(MetadataIndex(self.name, chunk.offsets, i), dim, begin - first, end - first, target)
            filled += target.numel()
        if filled != out.numel():
            raise ConvertError(f"the checkpoint's files hold only a part of {self.name}; convert it again")
        return out


class DcpPart(DcpTensor):
    """A part of a quantised parameter, which keeps its type when it is written again."""

    @property
    def stored_dtype(self) -> torch.dtype:
        """Its type."""
        return self.stored.properties.dtype


@dataclasses.dataclass(frozen=True)
class QuantisedTensor:
    """One parameter that a converted folder holds in quantised parts.

    Attributes:
        name: Meta's name.
        shape: of the whole parameter.
        form: how it is quantised.
        q, scale: the parts.
    """

    name: str
    shape: tuple[int, ...]
    form: Format
    q: DcpTensor
    scale: DcpTensor

    def read(self, dim: int, lo: int, hi: int, dtype: torch.dtype) -> torch.Tensor:
        """Dequantises the slab [lo, hi) along `dim` into a new contiguous tensor of `dtype`.

        Raises:
            ConvertError: a file is missing or damaged; the message names it.
        """
        slabs = [self.form.slab(part, dim, lo, hi) for part in ("q_NK", self.form.scale_name)]
        q_NK, scale = (
            part.read(*(slab or (0, 0, part.shape[0])), part.stored.properties.dtype)
            for part, slab in zip((self.q, self.scale), slabs, strict=True)
        )
        if dim == 0 or not self.form.group:
            return self.form.dequantise(q_NK, scale, dtype)
        begin = lo // 2 * 2
        weight_NK = self.form.dequantise(q_NK, scale, dtype, skip=begin % self.form.group)
        return weight_NK[:, lo - begin : hi - begin].contiguous()


@dataclasses.dataclass(frozen=True)
class DcpSource:
    """A converted folder.

    Attributes:
        info: its model.json.
        tensors: every parameter, in the order in which it is written.
        folder: where it lies.
        parts: the tensors as they are stored, where some are quantised; else empty.
    """

    info: CheckpointInfo
    tensors: tuple[DcpTensor | QuantisedTensor, ...]
    folder: Path
    parts: tuple[DcpTensor, ...] = ()

    @property
    def args(self) -> ModelArgs:
        """The network's numbers."""
        return self.info.args

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored weights."""
        dtype: torch.dtype = getattr(torch, self.info.dtype)
        return dtype


def open_dcp(folder: Path) -> DcpSource:
    """Opens a folder that `convert` wrote (DCP or safetensors); no weight is read.

    Raises:
        ConvertError: the folder is not one, or its files do not fit together; the message names the file.
    """
    try:
        info = CheckpointInfo.read(folder)
        manifest = StoredManifest.read(folder)
        reader = open_reader(folder, manifest)
        metadata = reader.read_metadata()
        manifest.check_files()
    except CheckpointError as e:
        raise ConvertError(str(e)) from None
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    files, stored = Files(folder, reader), metadata.state_dict_metadata
    tensors, parts = list[DcpTensor | QuantisedTensor](), list[DcpTensor]()

    def find(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorStorageMetadata:
        tensor = stored.get(name)
        if not isinstance(tensor, TensorStorageMetadata):  # also ends a nonsensical n_layers
            raise ConvertError(f"{folder} lacks {name}, which {MODEL_FILE} speaks of")
        if tuple(tensor.size) != shape or tensor.properties.dtype != dtype:
            raise ConvertError(
                f"{folder}: {name} is {format_shape(tuple(tensor.size))} {tensor.properties.dtype}, but {MODEL_FILE} "
                f"makes it {format_shape(shape)} {dtype}"
            )
        return tensor

    for name in parameter_names(info.args.n_layers):
        shape = global_shape(name, info.args)
        form = None if info.quantization is None else format_of(name, shape, info.quantization)
        if form is None:
            plain = DcpTensor(name, shape, find(name, shape, getattr(torch, info.dtype)), files)
            tensors.append(plain)
            parts.append(plain)
            continue
        owner = name.removesuffix(".weight")
        found = {
            part: DcpPart(f"{owner}.{part}", size, find(f"{owner}.{part}", size, dtype), files)
            for part, (size, dtype) in form.parts(shape).items()
        }
        tensors.append(QuantisedTensor(name, shape, form, found["q_NK"], found[form.scale_name]))
        parts += found.values()
    if len(stored) != len(parts):
        extra = next(name for name in stored if name not in {t.name for t in parts})
        raise ConvertError(f"{folder} holds {extra}, which {MODEL_FILE} does not describe")
    return DcpSource(info, tuple(tensors), folder, tuple(parts) if info.quantization is not None else ())

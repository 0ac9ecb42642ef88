"""Writes Meta's own form: `consolidated.NN.pth` at any model-parallel (MP) size, `params.json`, `checklist.chk`.

`torch.save` wants all of a shard in memory. Its format is a zip archive of uncompressed records: a pickle of how the
tensors lie in them, and one record of bytes for each; here the records are streamed. `torch.load` reads the files,
`weights_only` and `mmap` included.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2

from tpserve.convert.checklist import CHECKLIST
from tpserve.convert.errors import ConvertError
from tpserve.convert.layout import EMBEDDING, FAIRSCALE_DIM
from tpserve.convert.manifest import HashedFile, Manifest, file_digest
from tpserve.convert.meta_params import is_llama3, params_of
from tpserve.convert.weights import BLOCK_BYTES, Weight, raw_bytes, read_slab, row_blocks
from tpserve.model.args import ModelArgs
from tpserve.model.plan import parameter_kind

PARAMS_FILE = "params.json"
# What a record adds to a tensor's own bytes: headers in both directories, and its entry in the pickle.
RECORD_OVERHEAD_BYTES = 1024
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_ALIGNMENT_BYTES = 64  # torch.save's own
_LOCAL_HEADER_BYTES, _ZIP64_BYTES, _EXTRA_HEADER_BYTES = 30, 20, 4
# Slabs of columns up to this size are read whole; beyond, whole rows are read and their other columns dropped.
_COLUMNS_BYTES = 8 * BLOCK_BYTES


def check_mp(args: ModelArgs, mp: int) -> None:
    """Whether Meta's code can run a model in `mp` parts.

    Raises:
        ConvertError: it cannot; the message names the number that does not divide and those that do.
    """
    counts = {"n_heads": args.n_heads, "n_kv_heads": args.n_kv_heads, "ffn_hidden_dim": args.ffn_hidden_dim,
              "vocab_size": args.vocab_size}  # fmt: skip
    sizes = [n for n in range(1, args.n_kv_heads + 1) if all(count % n == 0 for count in counts.values())]
    if mp not in sizes:
        name, count = next(((n, c) for n, c in counts.items() if mp < 1 or c % mp), ("n_kv_heads", args.n_kv_heads))
        raise ConvertError(
            f"--mp {mp} does not divide {name} ({count}); this model can be cut into {', '.join(map(str, sizes))} parts"
        )


def write_meta(
    folder: Path,
    args: ModelArgs,
    tensors: Sequence[Weight],
    dtype: torch.dtype,
    mp: int,
    manifest: Manifest,
    on_bytes: Callable[[int], object] = lambda n: None,
) -> None:
    """Writes the shards one after the other, and what goes with them; call it after every other file is written.

    Raises:
        ConvertError: no params.json can describe the model, or a weight does not fit into `dtype`.
        OSError: of the disk.
    """
    manifest.write_bytes(PARAMS_FILE, (json.dumps(params_of(args)) + "\n").encode())
    others = sorted(p.name for p in folder.iterdir() if p.name != CHECKLIST)
    sums = {name: file_digest(folder / name, "md5") for name in others}
    for rank in range(mp):
        name = f"consolidated.{rank:02d}.pth"
        with HashedFile(folder / name, md5=True) as file:
            cuts = [_cut(tensor.name, tensor.shape, args, mp, rank) for tensor in tensors]
            shapes = {
                tensor.name: tuple(hi - lo if d == dim else n for d, n in enumerate(tensor.shape))
                for tensor, (dim, lo, hi) in zip(tensors, cuts, strict=True)
            }
            with zipfile.ZipFile(_Stream(file), "w") as archive:
                root = name.removesuffix(".pth")
                _record(archive, file, f"{root}/data.pkl", [_pickled(shapes, dtype)])
                _record(archive, file, f"{root}/byteorder", [b"little"])
                for i, (tensor, (dim, lo, hi)) in enumerate(zip(tensors, cuts, strict=True)):
                    data = _slices(tensor, dim, lo, hi, dtype, on_bytes)
                    _record(archive, file, f"{root}/data/{i}", data)
                _record(archive, file, f"{root}/version", [b"3\n"])
        manifest.add(name, file)
        sums[name] = file.md5_hexdigest()
    lines = [f"{sums[name]}  {name}\n" for name in sorted(sums)]
    manifest.write_bytes(CHECKLIST, "".join(lines).encode())


def _cut(name: str, shape: tuple[int, ...], args: ModelArgs, mp: int, rank: int) -> tuple[int, int, int]:
    """(dimension, first, end) of a rank's part, by Fairscale's layers of the model's generation."""
    if name == EMBEDDING:
        dim: int | None = 0 if is_llama3(args) else 1  # VocabParallelEmbedding, ParallelEmbedding
    else:
        dim = FAIRSCALE_DIM[parameter_kind(name)]
    if dim is None:
        return 0, 0, shape[0]
    part = shape[dim] // mp
    return dim, rank * part, (rank + 1) * part


def _slices(
    tensor: Weight, dim: int, lo: int, hi: int, dtype: torch.dtype, on_bytes: Callable[[int], object]
) -> Iterator[memoryview]:
    """The bytes of a slab in row order, a block at a time."""
    if dim == 0:
        blocks = row_blocks(tensor, dtype, rows=(lo, hi))
    elif tensor.shape[0] * (hi - lo) * dtype.itemsize <= _COLUMNS_BYTES:
        blocks = iter([read_slab(tensor, dim, lo, hi, dtype)])
    else:
        blocks = (block[:, lo:hi].contiguous() for block in row_blocks(tensor, dtype))
    for block in blocks:
        yield raw_bytes(block)
        on_bytes(block.nbytes)


class _Stream:
    """What `zipfile` may use of a file that is hashed while it is written: no `seek`, no `tell`."""

    def __init__(self, file: HashedFile) -> None:
        self.write = file.write

    def close(self) -> None:
        """The file is closed by who opened it."""

    def flush(self) -> None:
        """Nothing is buffered."""


def _record(archive: zipfile.ZipFile, file: HashedFile, name: str, data: Iterator[memoryview] | list[bytes]) -> None:
    """Appends a record whose bytes begin at a multiple of 64; the CRC-32 and sizes follow it."""
    info = zipfile.ZipInfo(name)
    padding = -(file.position + _LOCAL_HEADER_BYTES + len(name) + _ZIP64_BYTES + _EXTRA_HEADER_BYTES) % _ALIGNMENT_BYTES
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as record:
        for piece in data:
            record.write(piece)


class _Storage:
    """A tensor's bytes, in the record of this number."""

    def __init__(self, number: int, dtype: torch.dtype, numel: int) -> None:
        self.number, self.dtype, self.numel = number, dtype, numel


class _Tensor:
    """What stands for a tensor until it is pickled."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = storage, shape


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
        if isinstance(obj, _Storage):
            return ("storage", _STORAGES[obj.dtype], str(obj.number), "cpu", obj.numel)
        return None

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, _Tensor):
            strides = [torch.Size(obj.shape[d + 1 :]).numel() for d in range(len(obj.shape))]
            return _rebuild_tensor_v2, (obj.storage, 0, obj.shape, tuple(strides), False, OrderedDict())
        return NotImplemented


def _pickled(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """`data.pkl` of a state dict, as `torch.save` writes it."""
    out = io.BytesIO()
    state = {
        name: _Tensor(_Storage(i, dtype, torch.Size(shape).numel()), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    _Pickler(out, protocol=2).dump(state)
    return out.getvalue()

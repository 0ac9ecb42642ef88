"""The headers of safetensors files and the index over several of them. Free of torch.

Format: 8 bytes of length, a JSON header {name: {"dtype", "shape", "data_offsets"}}, then the tensors' bytes
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any

from tpserve.convert.errors import ConvertError
from tpserve.convert.json_file import read_json_object
from tpserve.convert.sniff import download_leftover

INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# Bytes of an element; the first three are those that weights may have.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEM_BYTES = {
    "F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    Attributes:
        path: its file.
        dtype: the format's own name, `BF16`.
        shape: of the tensor.
        offset: of its first byte in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file, by name.

    Raises:
        ConvertError: the file is not whole, or its header does not describe it; the message names it.
    """
    try:
        leftover = download_leftover(path)
        if leftover:
            raise ConvertError(f"{path} {leftover}")
        size = path.stat().st_size
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8).ljust(8, b"\xff"))
            if length > min(_MAX_HEADER_BYTES, size - 8):
                raise ConvertError(f"{path} is truncated or no safetensors file; download it again")
            header = json.loads(f.read(length))
        if not isinstance(header, dict):
            raise ConvertError(f"{path}: its header is no JSON object; download it again")
        start = 8 + length
        entries = {n: _entry(path, n, e, start, size - start) for n, e in header.items() if n != "__metadata__"}
    except OSError as e:
        raise ConvertError(f"{path} cannot be read: {e.strerror}") from None
    except ConvertError:
        raise
    except (ValueError, RecursionError) as e:
        raise ConvertError(f"{path} has a damaged header ({e}); download it again") from None
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset < end:
            raise ConvertError(f"{path}: {name} overlaps another tensor; download it again")
        end = entry.offset + math.prod(entry.shape) * _ITEM_BYTES[entry.dtype]
    return entries


def find_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model.

    Raises:
        ConvertError: the index names one that is missing, or lies elsewhere.
    """
    index = folder / INDEX_FILE
    if index.exists():
        return indexed_files(index)
    whole = folder / "model.safetensors"
    return [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))


def indexed_files(index: Path) -> list[Path]:
    """The files that an index (`{"weight_map": {name: file}}`) speaks of.

    Raises:
        ConvertError: it is no index, or names a file that is missing or lies elsewhere.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConvertError(f"{index}: weight_map is missing or does not name files; download it again")
    files = []
    for name in sorted(set(weight_map.values())):
        path = index.parent / name
        if Path(name).name != name:
            raise ConvertError(f"{index} names {name!r}, which is no file of this folder")
        if not path.is_file():
            raise ConvertError(f"{path} is missing, but {index.name} names it; download it again")
        files.append(path)
    return files


def _entry(path: Path, name: str, entry: Any, start: int, data_bytes: int) -> Entry:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sizes = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        raise ConvertError(f"{path}: the entry of {name[:200]} is damaged; download it again") from None
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES or not sizes or len(shape) > 8:
        raise ConvertError(f"{path}: {name[:200]} is {dtype!r} {list(shape)[:8]}, which is not known")
    if end - begin != math.prod(shape) * _ITEM_BYTES[dtype] or not 0 <= begin <= end:
        raise ConvertError(f"{path}: the entry of {name[:200]} contradicts itself; download it again")
    if end > data_bytes:
        raise ConvertError(f"{path} is truncated: it ends before {name[:200]}; download it again")
    return Entry(path, dtype, shape, start + begin)

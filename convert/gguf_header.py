"""The header of a GGUF file: metadata and where each tensor lies. Free of torch.

Format (ggml/docs/gguf.md, little-endian): "GGUF", version, two counts; so many keys with typed values; so many tensors
with shape, type and offset; then the data. The `gguf` package's reader makes an object of every word of the vocabulary
and believes the counts; this one looks at arrays only when they are asked for, and at every size first.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

from tpserve.convert.errors import ConvertError
from tpserve.convert.sniff import download_leftover

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_KEYS, _MAX_TENSORS, _MAX_DIMS = 1 << 16, 1 << 20, 4
_MAX_NAME_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class GgufArray:
    """An array that was not read: type of its items, their number, and the offset of the first in the file."""

    item_type: int
    count: int
    offset: int


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies.

    Attributes:
        type_name: of `gguf.GGMLQuantizationType`: F32, F16, BF16, Q4_0, ….
        shape: rows first, as torch has it (the file has it the other way round).
        block_elements, block_bytes: a row is a number of blocks of so many elements in so many bytes.
        offset: of its first byte in the file.
    """

    type_name: str
    shape: tuple[int, ...]
    block_elements: int
    block_bytes: int
    offset: int


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """The content of the header.

    Attributes:
        path: the file.
        metadata: by key; arrays as `GgufArray`, see `array`.
        tensors: by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def array(self, key: str) -> list[Any]:
        """The items of an array; empty when there is none of this name.

        Raises:
            ConvertError: the value is no array, or is damaged.
        """
        found = self.metadata.get(key)
        if found is None:
            return []
        if not isinstance(found, GgufArray):
            raise ConvertError(f"{self.path}: {key} is not an array")
        with self.path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(self.path, data, found.offset)
            return [cursor.value(found.item_type) for _ in range(found.count)]


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads and checks the header.

    Raises:
        ConvertError: the file is damaged, truncated, or of a version or type that is not known.
    """
    try:
        leftover = download_leftover(path)
        if leftover:
            raise ConvertError(f"{path} {leftover}")
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, data)
    except OSError as e:
        raise ConvertError(f"{path} cannot be read: {e.strerror}") from None


def _read(path: Path, data: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(path, data, 0)
    if bytes(cursor.take(4)) != b"GGUF":
        raise ConvertError(f"{path} is not a GGUF file (it begins with {bytes(data[:8])!r})")
    version = cursor.number("I")
    if version not in (2, 3):
        why = "was written on a big-endian machine" if version & 0xFFFF == 0 else f"has GGUF version {version}"
        raise ConvertError(f"{path} {why}; versions 2 and 3, little-endian, are read: convert the model again")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    if num_tensors > _MAX_TENSORS or num_keys > _MAX_KEYS:
        raise cursor.damaged(f"{num_tensors} tensors and {num_keys} keys")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.name()
        metadata[key] = cursor.value(cursor.number("I"))
    raw = [(cursor.name(), cursor.dims(), cursor.number("I"), cursor.number("Q")) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    types = _quant_types()
    tensors: dict[str, GgufTensor] = {}
    for name, dims, type_number, offset in raw:
        if type_number not in types:
            raise ConvertError(f"{path}: {name} has type {type_number}, which the installed gguf package does not know")
        type_name, elements, size = types[type_number]
        tensor = GgufTensor(type_name, tuple(reversed(dims)), elements, size, start + offset)
        if name in tensors or not dims or dims[0] % elements:
            raise cursor.damaged(f"{name} twice, or of shape {tensor.shape}")
        if tensor.offset + math.prod(dims) // elements * size > len(data):
            raise ConvertError(f"{path} is truncated: it ends before {name}; download it again")
        tensors[name] = tensor
    return GgufHeader(path, metadata, tensors)


def _quant_types() -> dict[int, tuple[str, int, int]]:
    from gguf.constants import GGML_QUANT_SIZES  # here: the package takes a third of a second, other kinds need none

    return {int(kind): (str(kind.name), *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


class _Cursor:
    """Reads from a position on, never beyond the end."""

    def __init__(self, path: Path, data: mmap.mmap, position: int) -> None:
        self._path, self._data, self.position = path, data, position

    def damaged(self, what: str) -> ConvertError:
        return ConvertError(f"{self._path} has a damaged header ({what}); download it again")

    def take(self, size: int) -> bytes:
        begin, self.position = self.position, self.position + size
        if self.position > len(self._data):
            raise ConvertError(f"{self._path} is truncated: its header ends at byte {begin}; download it again")
        return self._data[begin : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        length = self.number("Q")
        if length > len(self._data):
            raise self.damaged(f"a text of {length} bytes")
        return self.take(length).decode("utf-8", errors="replace")

    def name(self) -> str:
        (length,) = struct.unpack("<Q", self._data[self.position : self.position + 8].ljust(8, b"\xff"))
        if length > _MAX_NAME_BYTES:
            raise self.damaged(f"a name of {length} bytes at byte {self.position}")
        return self.text()

    def dims(self) -> list[int]:
        count = self.number("I")
        if count > _MAX_DIMS:
            raise self.damaged(f"a tensor of {count} dimensions")
        dims = [self.number("Q") for _ in range(count)]
        if not all(1 <= n < 1 << 48 for n in dims):
            raise self.damaged(f"a tensor of shape {dims}")
        return dims

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.damaged(f"a value of type {kind}")
        item, count = self.number("I"), self.number("Q")
        found = GgufArray(item, count, self.position)
        if item in _SCALARS and count <= len(self._data):
            self.take_nothing(count * struct.calcsize("<" + _SCALARS[item]))
        elif item == _STRING and count <= len(self._data) // 8:
            for _ in range(count):
                self.take_nothing(self.number("Q"))
        else:
            raise self.damaged(f"an array of {count} values of type {item}")
        return found

    def take_nothing(self, size: int) -> None:
        """Goes on by `size` bytes."""
        if size > len(self._data) - self.position:
            raise ConvertError(f"{self._path} is truncated: its header ends at byte {self.position}; download it again")
        self.position += size

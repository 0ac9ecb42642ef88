"""KServe v2's tensors, as JSON and as the binary extension writes them."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tpserve.engine import fields
from tpserve.engine.errors import RequestError

MAX_DIMS = 8
_MAX_EMPTY_ROWS = 1024
# datatype → how `struct` calls it
_PACKED = {
    "BOOL": "?", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "INT8": "b", "INT16": "h", "INT32": "i",
    "INT64": "q", "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip
DATATYPES = ("BYTES", *_PACKED)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor.

    Attributes:
        data: flat, in row-major order.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Sequence[Any]

    def rows(self, num_rows: int) -> list[Any]:
        """What each of a batch's requests gets: nested as the shape says, less the batch dimension.

        Args:
            num_rows: of the batch. A tensor of one element, or of one row, is every row's; one whose first dimension
                is no batch is the only row's.

        Raises:
            RequestError: it has another number of rows.
        """
        nested = _nest(self.data, self.shape)
        if self.shape and self.shape[0] == num_rows and (num_rows > 1 or len(self.shape) > 1):
            return list(nested)
        if self.shape and self.shape[0] == 1 and len(self.shape) > 1:
            return [nested[0]] * num_rows
        if num_rows == 1 or len(self.data) == 1:
            return [nested] * num_rows
        raise RequestError(
            f"{self.name} has {self.shape[0] if self.shape else 1} rows, the batch has {num_rows}", field=self.name
        )


def _nest(data: Sequence[Any], shape: Sequence[int]) -> Any:
    if not shape:
        return data[0]
    if len(shape) == 1:
        return list(data)
    step = len(data) // shape[0] if shape[0] else 0
    return [_nest(data[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def read_tensor(given: Any, where: str, binary: Callable[[str, int], bytes]) -> Tensor:
    """One of a request's inputs.

    Args:
        given: its JSON object.
        where: it stood, for messages.
        binary: from a tensor's name and size to the bytes that follow the JSON.

    Raises:
        RequestError: names the tensor.
    """
    if not isinstance(given, Mapping):
        raise RequestError(f"{where} must be an object, got {fields.shown(given)}", field="inputs")
    for key in given:
        if key not in ("name", "shape", "datatype", "data", "parameters"):
            raise RequestError(f"{where} has an unknown key {fields.shown(key)}", field="inputs")
    name = given.get("name")
    if not isinstance(name, str) or not name.isidentifier() or len(name) > 100:
        raise RequestError(f"{where}.name must be a tensor's name, got {fields.shown(name)}", field="inputs")
    datatype, shape = given.get("datatype"), _shape(name, given.get("shape"))
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise RequestError(
            f"{name}: datatype must be one of {', '.join(DATATYPES)}, got {fields.shown(datatype)}", field=name
        )
    parameters = given.get("parameters") or {}
    if not isinstance(parameters, Mapping) or not set(parameters) <= {"binary_data_size"}:
        raise RequestError(f"{name}: of parameters, only binary_data_size is served", field=name)
    size = parameters.get("binary_data_size")
    if size is None:
        data = _flat(name, datatype, given.get("data"))
    elif "data" in given:
        raise RequestError(f"{name} has both data and binary_data_size; send one of them", field=name)
    else:
        data = _unpack(name, datatype, binary(name, fields.integer(name, size)))
    if len(data) != math.prod(shape):
        raise RequestError(
            f"{name} has {len(data)} elements; its shape {list(shape)} says {math.prod(shape)}", field=name
        )
    return Tensor(name, datatype, shape, data)


def _shape(name: str, given: Any) -> tuple[int, ...]:
    shape = fields.token_ids(name, given) if isinstance(given, list) else None
    if shape is None or len(shape) > MAX_DIMS:
        raise RequestError(f"{name}: shape must be a list of at most {MAX_DIMS} sizes", field=name)
    if 0 in shape[:-1] or (shape[-1:] == [0] and math.prod(shape[:-1]) > _MAX_EMPTY_ROWS):
        raise RequestError(f"{name}: shape {shape} has no elements", field=name)
    return tuple(shape)


def _flat(name: str, datatype: str, given: Any) -> list[Any]:
    """JSON's data, which may be nested or flat."""
    if not isinstance(given, list):
        raise RequestError(f"{name} has no data: it must be a list, got {fields.shown(given)}", field=name)
    for _ in range(MAX_DIMS):
        if not any(isinstance(item, list) for item in given):
            break
        if not all(isinstance(item, list) for item in given):
            raise RequestError(f"{name}: data is nested unevenly", field=name)
        given = [element for row in given for element in row]
    return [_element(name, datatype, element) for element in given]


def _element(name: str, datatype: str, element: Any) -> Any:
    if datatype == "BYTES":
        return fields.string(name, element)
    if datatype == "BOOL":
        return fields.boolean(name, element)
    if datatype.startswith("FP"):
        return fields.number(name, element)
    bits, low = int(datatype.lstrip("UINT")), 0 if datatype.startswith("U") else -1
    integer = fields.integer(name, element)
    if not low << (bits - 1) <= integer < 1 << (bits + low):
        raise RequestError(f"{name} must hold {datatype}, got {integer}", field=name)
    return integer


def _unpack(name: str, datatype: str, packed: bytes) -> list[Any]:
    if datatype == "BYTES":
        return _unpack_texts(name, packed)
    code = _PACKED[datatype]
    size = struct.calcsize(f"<{code}")
    if len(packed) % size:
        raise RequestError(f"{name} has {len(packed)} bytes; an element of {datatype} has {size}", field=name)
    data = list(struct.unpack(f"<{len(packed) // size}{code}", packed))
    return [_element(name, datatype, element) for element in data] if datatype.startswith("FP") else data


def _unpack_texts(name: str, packed: bytes) -> list[str]:
    texts: list[str] = []
    at = 0
    while at < len(packed):
        size = int.from_bytes(packed[at : at + 4], "little")
        text = packed[at + 4 : at + 4 + size]
        if at + 4 + size > len(packed):
            raise RequestError(f"{name} ends inside element {len(texts)}", field=name)
        try:
            texts.append(text.decode())
        except UnicodeDecodeError as e:
            raise RequestError(f"{name}: element {len(texts)} is not UTF-8: {e.reason}", field=name) from None
        at += 4 + size
    return texts


def pack(tensor: Tensor) -> bytes:
    """A tensor's data, as the binary extension has it."""
    if tensor.datatype != "BYTES":
        return struct.pack(f"<{len(tensor.data)}{_PACKED[tensor.datatype]}", *tensor.data)
    texts = [text.encode() for text in tensor.data]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)

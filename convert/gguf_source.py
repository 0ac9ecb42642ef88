"""A GGUF file as a `Source`: mapped, and dequantised a few rows at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from tpserve.convert.errors import ConvertError
from tpserve.convert.gguf_config import EMBEDDING as GGUF_EMBEDDING
from tpserve.convert.gguf_config import ROPE_FACTORS, args_from_gguf, dtype_name, gguf_name
from tpserve.convert.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from tpserve.convert.kinds import Kind
from tpserve.convert.layout import EMBEDDING, format_shape, global_shape, parameter_names
from tpserve.convert.mapped_file import MappedFile
from tpserve.convert.source import Source, plain_info
from tpserve.convert.source_tensor import SourceTensor, release_pages
from tpserve.convert.weights import Weight
from tpserve.model.args import ModelArgs
from tpserve.model.plan import parameter_kind

OUTPUT = "output.weight"
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Of float32 at a time: the package keeps several copies, and they are worked on fastest while they fit in a cache.
_BLOCK_BYTES = 512 << 10


@dataclasses.dataclass(frozen=True)
class QuantisedTensor:
    """A weight in blocks of quantised numbers.

    Attributes:
        name: Meta's name.
        shape: of the weight, rows first.
        data: the blocks, [rows, bytes of a row], a read-only file mapping.
        type_name: of `gguf.GGMLQuantizationType`.
        block_elements, block_bytes: a row is a number of blocks of so many elements in so many bytes.
    """

    name: str
    shape: tuple[int, ...]
    data: torch.Tensor
    type_name: str
    block_elements: int
    block_bytes: int

    def read(self, dim: int, lo: int, hi: int, dtype: torch.dtype) -> torch.Tensor:
        """Dequantises the slab [lo, hi) along `dim` into a new contiguous tensor of `dtype`.

        Of a row only the blocks that the slab touches are computed. A few times `_BLOCK_BYTES` are in memory, and the
        returned tensor.
        """
        rows = (lo, hi) if dim == 0 else (0, self.shape[0])
        columns = (lo, hi) if dim == 1 else (0, self.shape[1])
        blocks = columns[0] // self.block_elements, -(-columns[1] // self.block_elements)
        skip, width = columns[0] - blocks[0] * self.block_elements, columns[1] - columns[0]
        data = self.data[:, blocks[0] * self.block_bytes : blocks[1] * self.block_bytes]
        out = torch.empty(rows[1] - rows[0], width, dtype=dtype)
        step = max(1, _BLOCK_BYTES // (4 * self.block_elements * max(1, blocks[1] - blocks[0])))
        for begin in range(rows[0], rows[1], step):
            part = data[begin : min(begin + step, rows[1])]
            # As one long row: the package goes through an array sixteen rows at a time, and blocks know no rows.
            values = dequantize(part.numpy().reshape(1, -1), GGMLQuantizationType[self.type_name])
            target = out[begin - rows[0] : begin - rows[0] + part.shape[0]]
            target.copy_(torch.from_numpy(values).view(part.shape[0], -1)[:, skip : skip + width])
            release_pages(part)
        return out


def open_gguf(path: Path) -> Source:
    """Opens and checks a GGUF file; no weight is read.

    Raises:
        ConvertError: something is missing, unknown, or does not fit; the message names the file and the key.
    """
    header = read_gguf_header(path)
    args = args_from_gguf(header)
    tied = gguf_name(OUTPUT) not in header.tensors
    layers = {int(n.split(".")[1]) for n in header.tensors if n.startswith("blk.") and n.split(".")[1].isdecimal()}
    # One layer more than there is names what is missing; a nonsensical number must not make a list of that length.
    names = {n: gguf_name(n) for n in parameter_names(min(args.n_layers, max(layers, default=-1) + 2))}
    if tied:
        names[OUTPUT] = GGUF_EMBEDDING
    stored, wanted = set(header.tensors), set(names.values())
    unknown, missing = stored - wanted - {ROPE_FACTORS}, wanted - stored
    for what, found in (("is not a weight of this model", unknown), ("is missing", missing)):
        for name in sorted(found):
            raise ConvertError(f"{path}: {name} {what}; its metadata describe a Llama with {args.n_layers} layers")
    file = MappedFile(path)
    tensors = tuple(_weight(name, theirs, header, file, args) for name, theirs in names.items())
    return Source(plain_info(args, getattr(torch, dtype_name(header)), Kind.GGUF), tensors, Kind.GGUF)


def _weight(name: str, stored_name: str, header: GgufHeader, file: MappedFile, args: ModelArgs) -> Weight:
    stored, shape = header.tensors[stored_name], global_shape(name, args)
    padded = parameter_kind(name) in (EMBEDDING, OUTPUT) and len(stored.shape) == 2 and stored.shape[0] > shape[0]
    if stored.shape[padded:] != shape[padded:]:  # rows that pad the vocabulary stand for no token
        raise ConvertError(
            f"{header.path}: {stored_name} is {format_shape(stored.shape)}, but the metadata make it "
            f"{format_shape(shape)}: download it again"
        )
    if stored.type_name in _PLAIN:
        whole = file.tensor(_PLAIN[stored.type_name], stored.shape, stored.offset)
        return SourceTensor(name, shape, (whole[: shape[0]],), 0, mapped=True)
    if len(shape) == 1 or not _can_dequantise(stored):
        raise ConvertError(f"{header.path}: {stored_name} is {stored.type_name}, which cannot be read here")
    row_bytes = shape[1] // stored.block_elements * stored.block_bytes
    data = file.tensor(torch.uint8, (shape[0], row_bytes), stored.offset)
    return QuantisedTensor(name, shape, data, stored.type_name, stored.block_elements, stored.block_bytes)


def _can_dequantise(stored: GgufTensor) -> bool:
    """Whether the installed package knows how; it tells only by trying."""
    try:
        dequantize(np.zeros((1, stored.block_bytes), dtype=np.uint8), GGMLQuantizationType[stored.type_name])
    except NotImplementedError:
        return False
    return True

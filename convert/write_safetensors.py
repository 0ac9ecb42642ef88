"""Writers of safetensors: our folder of one file a layer, and the files that a Hugging Face folder is made of."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

import torch

from tpserve.convert.manifest import HashedFile, Manifest
from tpserve.convert.weights import Weight, layer_of, raw_bytes, row_blocks, stored_dtype
from tpserve.model.safetensors_reader import DTYPES, stored_chunks

SUFFIX = ".safetensors"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT_BYTES = 64  # of the data's beginning; the format asks for 8


def header(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> bytes:
    """A file's beginning, for tensors that follow each other in the order of `shapes`."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # `transformers` asks for it
    position = 0
    for name, shape in shapes.items():
        end = position + torch.Size(shape).numel() * dtypes[name].itemsize
        entries[name] = {"dtype": _NAMES[dtypes[name]], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    padding = -(8 + len(text)) % _ALIGNMENT_BYTES
    return struct.pack("<Q", len(text) + padding) + text + b" " * padding


def write_layers(
    folder: Path,
    tensors: Iterable[Weight],
    dtype: torch.dtype,
    manifest: Manifest,
    on_bytes: Callable[[int], object] = lambda n: None,
) -> None:
    """Writes one `.safetensors` file a layer under Meta's names, which `SafetensorsReader` reads; see `write_dcp`.

    The manifest gets a CRC-32 of each of the chunks in which ranks read, of their bytes as they follow each other in
    the chunk: column chunks (of `wo` and `w2`) do not lie in one piece in the file.

    Raises:
        ConvertError: a weight does not fit into `dtype`; the message names it.
        OSError: of the disk.
    """
    for layer, members in groupby(tensors, key=lambda t: layer_of(t.name)):
        group = list(members)
        with HashedFile(folder / (layer + SUFFIX)) as file:
            dtypes = {t.name: stored_dtype(t, dtype) for t in group}
            file.write(header({t.name: t.shape for t in group}, dtypes))
            for tensor in group:
                dim, bounds = stored_chunks(tensor.name, tensor.shape)
                start, row = file.position, 0
                item_bytes = torch.Size(tensor.shape[dim + 1 :]).numel() * dtypes[tensor.name].itemsize
                crc = [0] * len(bounds)
                for block in row_blocks(tensor, dtypes[tensor.name]):
                    for i, (lo, hi) in enumerate(bounds):
                        if dim == 0:
                            lo, hi = max(lo - row, 0), min(hi - row, block.shape[0])
                        if lo < hi:
                            crc[i] = zlib.crc32(raw_bytes(block.narrow(dim, lo, hi - lo).contiguous()), crc[i])
                    file.write(raw_bytes(block))
                    row += block.shape[0]
                    on_bytes(block.nbytes)
                file.crc32 |= {start + lo * item_bytes: crc[i] for i, (lo, _) in enumerate(bounds)}
        manifest.add(layer + SUFFIX, file)


def write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Callable[[str], Iterator[torch.Tensor]],
    dtype: torch.dtype,
    manifest: Manifest,
    on_bytes: Callable[[int], object],
) -> None:
    """Writes one file.

    Args:
        path: must not exist.
        shapes: of its tensors, in their order.
        blocks: of the name of a tensor: its bytes' tensors, one after the other.
        dtype: of all of them.
        manifest: is told of the file.
        on_bytes: called with the size of every block once it is written.
    """
    with HashedFile(path) as file:
        file.write(header(shapes, dict.fromkeys(shapes, dtype)))
        for name in shapes:
            for block in blocks(name):
                file.write(raw_bytes(block))
                on_bytes(block.nbytes)
    manifest.add(path.name, file)

"""A Hugging Face folder as a `Source`: safetensors or `pytorch_model*.bin`, mapped, in Meta's names and order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from tpserve.convert.describe import bin_files, has_safetensors
from tpserve.convert.errors import ConvertError
from tpserve.convert.hf_config import CONFIG_FILE, args_from_config, hf_name, is_hf_buffer, is_tied
from tpserve.convert.json_file import read_json_object
from tpserve.convert.kinds import Kind
from tpserve.convert.layout import EMBEDDING, format_shape, global_shape, parameter_names
from tpserve.convert.mapped_file import MappedFile
from tpserve.convert.safetensors_header import DTYPES, find_files, read_header
from tpserve.convert.shard_files import open_shard
from tpserve.convert.sniff import is_legacy_torch_file
from tpserve.convert.source import Source, plain_info
from tpserve.convert.source_tensor import BLOCK_BYTES, SourceTensor, release_pages
from tpserve.convert.weights import Weight
from tpserve.model.args import ModelArgs
from tpserve.model.plan import parameter_kind

OUTPUT = "output.weight"
_LIKELY_BIAS = "; Llamas with biases are not read"


@dataclasses.dataclass(frozen=True)
class RotatedTensor:
    """Queries' or keys' weight that is stored for rotate-half, read as Meta's interleaved one.

    Hugging Face rotates component i of a head with component i + head_dim / 2, Meta with its neighbour. So Meta's row
    2i + c of a head is Hugging Face's row c · head_dim / 2 + i (transformers, convert_llama_weights_to_hf.py).

    Attributes:
        name: Meta's name.
        stored: the whole weight in Hugging Face's order, [heads · head_dim, dim].
        head_dim: rows of one head.
        mapped: whether `stored` is a read-only file mapping.
    """

    name: str
    stored: torch.Tensor
    head_dim: int
    mapped: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        return tuple(self.stored.shape)

    def read(self, dim: int, lo: int, hi: int, dtype: torch.dtype) -> torch.Tensor:
        """Copies the slab [lo, hi) along `dim` into a new contiguous tensor of `dtype`.

        Only the returned tensor and twice `BLOCK_BYTES` are in memory at a time.
        """
        columns = (lo, hi) if dim == 1 else (0, self.shape[1])
        first, last = (lo, hi) if dim == 0 else (0, self.shape[0])
        stored = self.stored[:, columns[0] : columns[1]]
        out = torch.empty(last - first, columns[1] - columns[0], dtype=dtype)
        step = max(1, BLOCK_BYTES // (self.shape[1] * stored.element_size()))
        for begin in range(first, last, step):
            end = min(begin + step, last)
            out[begin - first : end - first] = stored[self._stored_rows(begin, end)]
            if self.mapped:
                heads = begin // self.head_dim, -(-end // self.head_dim)
                release_pages(stored[heads[0] * self.head_dim : heads[1] * self.head_dim])
        return out

    def _stored_rows(self, begin: int, end: int) -> torch.Tensor:
        rows = torch.arange(begin, end)
        head, row = rows // self.head_dim, rows % self.head_dim
        return head * self.head_dim + row % 2 * (self.head_dim // 2) + row // 2


def open_hf(folder: Path) -> Source:
    """Opens and checks a Hugging Face folder; no weight is read.

    Raises:
        ConvertError: something is missing, unknown, or does not fit; the message names the file and the key.
    """
    config_path = folder / CONFIG_FILE
    config = read_json_object(config_path)
    args = args_from_config(config_path, config)
    files = find_files(folder) if has_safetensors(folder) else bin_files(folder)
    stored: dict[str, torch.Tensor] = {}
    where: dict[str, Path] = {}
    for path in files:
        for name, tensor in (_safetensors(path) if path.suffix == ".safetensors" else _pickled(path)).items():
            if name in stored:
                raise ConvertError(f"{path}: {name} is in {where[name].name}, too; which of them is the model?")
            stored[name], where[name] = tensor, path
    tied = is_tied(config) or hf_name(OUTPUT) not in stored
    names = _check_names(folder, args, where, tied)
    mapped = not any(path.suffix == ".bin" and is_legacy_torch_file(path) for path in files)
    tensors = tuple(_weight(name, stored[hf], where[hf], args, mapped) for name, hf in names.items())
    info = plain_info(args, stored[hf_name(EMBEDDING)].dtype, Kind.HUGGING_FACE)
    return Source(info, tensors, Kind.HUGGING_FACE)


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    file = MappedFile(path)
    found = {}
    for name, entry in read_header(path).items():
        if is_hf_buffer(name):
            continue
        if entry.dtype not in DTYPES:
            raise ConvertError(f"{path}: {name} is {entry.dtype}; weights must be F32, F16 or BF16")
        found[name] = file.tensor(getattr(torch, DTYPES[entry.dtype]), entry.shape, entry.offset)
    return found


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in open_shard(path).tensors.items() if not is_hf_buffer(name)}


def _check_names(folder: Path, args: ModelArgs, where: dict[str, Path], tied: bool) -> dict[str, str]:
    """Meta's names and, for each, the name under which it is stored.

    Raises:
        ConvertError: a weight is missing or unknown.
    """
    layers = {int(n.split(".")[2]) for n in where if n.startswith("model.layers.") and n.split(".")[2].isdecimal()}
    # One layer more than there is names what is missing; a nonsensical number must not make a list of that length.
    n_layers = min(args.n_layers, max(layers, default=-1) + 2)
    names = {name: hf_name(name) for name in parameter_names(n_layers)}
    if tied:
        names[OUTPUT] = names[EMBEDDING]
    known = set(names.values()) | {hf_name(OUTPUT)}
    for name, path in where.items():
        if name not in known:
            bias = _LIKELY_BIAS if name.endswith(".bias") else ""
            raise ConvertError(
                f"{path}: {name} is not a weight of this model; {CONFIG_FILE} describes a Llama with {args.n_layers} "
                f"layers: is it the one of these weights?{bias}"
            )
    for name in names.values():
        if name not in where:
            files = ", ".join(sorted({p.name for p in where.values()})) or "none"
            raise ConvertError(f"{folder}: {name} is missing (files read: {files}); are all files downloaded?")
    return names


def _weight(name: str, stored: torch.Tensor, path: Path, args: ModelArgs, mapped: bool) -> Weight:
    shape = global_shape(name, args)
    kind = parameter_kind(name)
    if kind in (EMBEDDING, OUTPUT) and stored.ndim == 2 and stored.shape[0] > shape[0]:
        stored = stored[: shape[0]]  # rows that pad the vocabulary stand for no token
    if tuple(stored.shape) != shape:
        raise ConvertError(
            f"{path}: {hf_name(name)} is {format_shape(tuple(stored.shape))}, but {CONFIG_FILE} makes it "
            f"{format_shape(shape)}: wrong {CONFIG_FILE} or wrong weights"
        )
    if kind in ("attention.wq.weight", "attention.wk.weight"):
        return RotatedTensor(name, stored, args.head_dim, mapped)
    return SourceTensor(name, shape, (stored,), 0, mapped)

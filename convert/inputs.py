"""What a conversion starts from: the checkpoint of a folder, checked, with the tokenizer that goes with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tpserve.convert.checklist import read_checklist, verify_checklist
from tpserve.convert.errors import ConvertError
from tpserve.convert.kinds import Kind, kind_of
from tpserve.convert.open_any import open_any
from tpserve.convert.shard_files import verify_shard
from tpserve.convert.source import open_source
from tpserve.convert.tokenizer import Tokenizer, find_tokenizer
from tpserve.convert.weights import Weight
from tpserve.model.args import ModelArgs


@dataclasses.dataclass(frozen=True)
class Input:
    """A checkpoint to convert.

    Attributes:
        args: the network's numbers.
        dtype: of the model.
        tensors: every parameter, in the order in which it is written.
        tokenizer: None: there is none that is served.
        origin: where the weights came from, for model.json.
        params: Meta's params.json as it stands; empty for other inputs.
        num_shards: of Meta's files; 1 for other inputs.
        quantization: of our own folder's weights; None: they have the bits of `dtype`.
        parts: what is stored in the place of `tensors` where some are quantised.
    """

    args: ModelArgs
    dtype: torch.dtype
    tensors: Sequence[Weight]
    tokenizer: Tokenizer | None
    origin: dict[str, Any]
    params: dict[str, object]
    num_shards: int
    quantization: str | None = None
    parts: Sequence[Weight] = ()


def open_input(folder: Path, tokenizer_path: Path | None, num_shards: int | None, progress: bool) -> Input:
    """Finds out what a folder is, opens it, and holds its files against the sums that came with them.

    Args:
        folder: of the checkpoint, or a .gguf file.
        tokenizer_path: None looks for one.
        num_shards: how many of Meta's shards there must be; None takes what there is.
        progress: show bars on stderr.

    Raises:
        ConvertError: the checkpoint is not usable; the message names the file and the key.
        OSError: of the disk.
    """
    sums = read_checklist(folder)
    if kind_of(folder) is not Kind.META:
        other = open_any(folder)  # our own chunks are checked as they are read
        tokenizer = find_tokenizer(folder, tokenizer_path, other.args.vocab_size)
        info = other.info
        return Input(
            other.args, other.dtype, other.tensors, tokenizer, info.source, {}, 1, info.quantization, other.parts
        )
    source = open_source(folder)
    found = len(source.shards)
    if num_shards not in (None, found):
        raise ConvertError(f"--model_parallel_size is {num_shards}, but {folder} holds {found} shards")
    tokenizer = find_tokenizer(folder, tokenizer_path, source.args.vocab_size)
    with bar("checking md5", sum(f.stat().st_size for f in sums), progress and bool(sums)) as checked:
        verify_checklist(sums, checked.update)
    unlisted = [shard for shard in source.shards if shard.path not in sums]
    unlisted_bytes = sum(shard.path.stat().st_size for shard in unlisted if shard.mapped)
    with bar("checking crc32", unlisted_bytes, progress and bool(unlisted)) as checked:
        for shard in unlisted:
            verify_shard(shard, checked.update)
    origin = {"kind": Kind.META.value, "model_parallel_size": found}
    return Input(source.args, source.dtype, source.tensors, tokenizer, origin, source.params, found)


def bar(what: str, total_bytes: int, shown: bool) -> tqdm[Any]:
    """A progress bar with bytes and rate."""
    return tqdm(None, desc=what, total=total_bytes, unit="B", unit_scale=True, unit_divisor=1024, disable=not shown)

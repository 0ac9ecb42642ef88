"""A Fairscale checkpoint as one model: opens the shards and holds them against `params.json` and each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from tpserve.convert.errors import ConvertError
from tpserve.convert.kinds import Kind
from tpserve.convert.layout import (
    EMBEDDING,
    FAIRSCALE_DIM,
    embedding_shard_dim,
    format_shape,
    global_shape,
    parameter_names,
)
from tpserve.convert.shard_files import Shard, find_shards, open_shard
from tpserve.convert.sniff import download_leftover
from tpserve.convert.source_tensor import SourceTensor
from tpserve.convert.weights import Weight
from tpserve.model.args import ModelArgs, ModelArgsError, read_params_json
from tpserve.model.checkpoint import CheckpointInfo
from tpserve.model.plan import parameter_kind


@dataclasses.dataclass(frozen=True)
class Source:
    """A checked checkpoint of any kind, in Meta's layout.

    Attributes:
        info: what `describe` says of it: shape, dtype, tokenizer, where the weights come from.
        tensors: every parameter, in the order in which it is written.
        kind: what the files are.
        tokenizer_files: that say how text becomes tokens, the main one first.
        params: Meta's `params.json` as it stands; empty for other kinds.
        shards: Meta's files, opened, in rank order; none for other kinds.
        parts: what is stored in the place of `tensors` where some are quantised; none otherwise.
    """

    info: CheckpointInfo
    tensors: tuple[Weight, ...]
    kind: Kind
    tokenizer_files: tuple[Path, ...] = ()
    params: dict[str, object] = dataclasses.field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    parts: tuple[Weight, ...] = ()

    @property
    def args(self) -> ModelArgs:
        """The network's numbers."""
        return self.info.args

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding, and so of the model."""
        dtype: torch.dtype = getattr(torch, self.info.dtype)
        return dtype


def open_source(ckpt_dir: Path) -> Source:
    """Opens and checks a Fairscale checkpoint; no weight but the norms is read.

    Raises:
        ConvertError: something is missing, unknown, or does not fit; the message names the file and the key.
    """
    paths = find_shards(ckpt_dir)
    params_path = ckpt_dir / "params.json"
    params = _read_params(params_path)
    shards = [open_shard(path) for path in paths]
    try:
        # The embedding is needed to complete params.json (vocab_size is -1 there), the numbers to check the embedding.
        dim = ModelArgs.from_params({**params, "vocab_size": 1}).dim
        embedding_dim, vocab_size = _embedding_layout(shards, dim)
        args = ModelArgs.from_params(params, vocab_size=vocab_size)
    except ModelArgsError as e:
        raise ConvertError(f"{params_path}: {e}") from None
    for shard in shards:
        _check_names(shard, args)
    tensors = tuple(_join(name, shards, args, embedding_dim) for name in parameter_names(args.n_layers))
    info = plain_info(args, shards[0].tensors[EMBEDDING].dtype, Kind.META)
    return Source(info, tensors, Kind.META, params=params, shards=tuple(shards))


def plain_info(args: ModelArgs, dtype: torch.dtype, kind: Kind) -> CheckpointInfo:
    """What is known of a checkpoint before its tokenizer is looked for."""
    return CheckpointInfo(args, str(dtype).removeprefix("torch."), source={"kind": kind.value})


def _read_params(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise ConvertError(f"{path} is missing; it comes with the weights and says how many layers and heads they have")
    leftover = download_leftover(path)
    if leftover:
        raise ConvertError(f"{path} {leftover}")
    try:
        return read_params_json(path)
    except ModelArgsError as e:
        raise ConvertError(str(e)) from None


def _embedding_layout(shards: list[Shard], dim: int) -> tuple[int, int]:
    """The dimension along which the embedding was cut, and the number of its rows when whole."""
    first = shards[0]
    if EMBEDDING not in first.tensors:
        raise ConvertError(f"{first.path}: {EMBEDDING} is missing; these are not the weights of a Llama")
    shape = tuple(first.tensors[EMBEDDING].shape)
    try:
        shard_dim = embedding_shard_dim(shape, dim, len(shards))
    except ConvertError as e:
        raise ConvertError(f"{first.path}: {e}") from None
    return shard_dim, shape[0] * (len(shards) if shard_dim == 0 else 1)


def _check_names(shard: Shard, args: ModelArgs) -> None:
    # One layer more than there is names what is missing; a nonsensical n_layers must not make a list of that length.
    n_found = 1 + max(
        (int(n.split(".")[1]) for n in shard.tensors if n.startswith("layers.") and _in_layer(n)), default=-1
    )
    expected = dict.fromkeys(parameter_names(min(args.n_layers, n_found + 1)))
    missing = [name for name in expected if name not in shard.tensors]
    unknown = [name for name in shard.tensors if name not in expected]
    for names, what in ((unknown, "is not a weight of this model"), (missing, "is missing")):
        if names:
            more = " (and others)" if len(names) > 1 else ""
            raise ConvertError(
                f"{shard.path}: {names[0]} {what}{more}; "
                f"params.json describes a Llama with {args.n_layers} layers: is it the one of these weights?"
            )


def _in_layer(name: str) -> bool:
    return name.split(".")[1].isdecimal()


def _join(name: str, shards: list[Shard], args: ModelArgs, embedding_dim: int) -> SourceTensor:
    shape = global_shape(name, args)
    join_dim = embedding_dim if name == EMBEDDING else FAIRSCALE_DIM[parameter_kind(name)]
    expected = list(shape)
    if join_dim is not None:
        if shape[join_dim] % len(shards):
            raise ConvertError(
                f"{shards[0].path}: {name} is {format_shape(shape)} by params.json, which {len(shards)} shards cannot "
                "hold in equal parts: params.json and the shards belong to different models"
            )
        expected[join_dim] //= len(shards)
    parts = [shard.tensors[name] for shard in shards]
    for shard, part in zip(shards, parts, strict=True):
        if list(part.shape) != expected:
            raise ConvertError(
                f"{shard.path}: {name} is {format_shape(tuple(part.shape))}, but params.json makes it "
                f"{format_shape(tuple(expected))} in each of {len(shards)} shards: wrong params.json or wrong shard"
            )
        if part.dtype != parts[0].dtype:
            raise ConvertError(
                f"{shard.path}: {name} is {part.dtype}, but {parts[0].dtype} in {shards[0].path.name}: "
                "the shards are of different models"
            )
    mapped = all(shard.mapped for shard in shards)
    if join_dim is not None:
        return SourceTensor(name, shape, tuple(parts), join_dim, mapped)
    for shard, part in zip(shards[1:], parts[1:], strict=True):
        if not torch.equal(part, parts[0]):
            raise ConvertError(
                f"{shard.path}: {name} differs from the copy in {shards[0].path.name}: "
                "the shards are of different models"
            )
    return SourceTensor(name, shape, (parts[0],), 0, mapped)

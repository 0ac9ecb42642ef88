"""What a checkpoint of any kind is, from its headers: shape, dtype, tokenizer. Free of torch, reads no weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpserve.convert.errors import ConvertError
from tpserve.convert.gguf_config import args_from_gguf, dtype_name
from tpserve.convert.gguf_header import read_gguf_header
from tpserve.convert.hf_config import CONFIG_FILE, HF_NAMES, args_from_config
from tpserve.convert.inert_pickle import PickledTensor, dcp_tensor, pickled_tensors
from tpserve.convert.json_file import read_json_object
from tpserve.convert.kinds import LEGACY_ARGS_FILE, Kind, gguf_file, kind_of
from tpserve.convert.safetensors_header import DTYPES, find_files, indexed_files, read_header
from tpserve.convert.tokenizer import TOKENIZER_FILE, find_tokenizer
from tpserve.model.args import ModelArgs, ModelArgsError
from tpserve.model.checkpoint import CheckpointError, CheckpointInfo

EMBEDDING = "tok_embeddings.weight"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
# What `transformers` may have written beside the weights about text.
HF_TOKENIZER_FILES = (
    "tokenizer.json", TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "chat_template.jinja",
)  # fmt: skip


def describe(path: Path) -> CheckpointInfo:
    """What lies at `path`: any of the kinds in `docs/checkpoints.md`.

    `tokenizer` is a file in `folder_of(path)`: tokenizer.json, tokenizer.model, or the .gguf file itself. In Meta's
    downloads it may lie in the folder above; then the path is absolute.

    Raises:
        ConvertError: there is none, or it is none that can be served; the message names the file and the key.
    """
    kind = kind_of(path)
    if kind is Kind.TPSERVE:
        try:
            return CheckpointInfo.read(path)
        except CheckpointError as e:
            raise ConvertError(str(e)) from None
    by_kind = {
        Kind.META: _describe_meta,
        Kind.HUGGING_FACE: _describe_hf,
        Kind.GGUF: _describe_gguf,
        Kind.LEGACY_DCP: _describe_legacy,
    }
    return by_kind[kind](path)


def tokenizer_files(path: Path, info: CheckpointInfo) -> tuple[Path, ...]:
    """The files that say how text becomes tokens; the one that `info` names is the first."""
    if info.tokenizer is None:
        return ()
    if path.is_file():
        return (path,)
    first = path / info.tokenizer
    rest = [path / name for name in HF_TOKENIZER_FILES if name != info.tokenizer and (path / name).is_file()]
    return (first, *rest)


def read_legacy_args(folder: Path, vocab_size: int) -> ModelArgs:
    """The numbers of the old example's checkpoint; its script left them where it was started, often a folder above.

    Args:
        folder: of the checkpoint.
        vocab_size: rows of the embedding.

    Raises:
        ConvertError: the file is missing or describes no such Llama.
    """
    path = next((p for p in (folder / LEGACY_ARGS_FILE, folder.parent / LEGACY_ARGS_FILE) if p.is_file()), None)
    if path is None:
        raise ConvertError(
            f"{folder} holds .metadata, but neither model.json nor {LEGACY_ARGS_FILE}; the old tp_llama example wrote "
            f"{LEGACY_ARGS_FILE} where it was started: copy it to {folder}"
        )
    try:
        return ModelArgs.from_params(read_json_object(path), vocab_size=vocab_size)
    except ModelArgsError as e:
        raise ConvertError(f"{path}: {e}") from None


def bin_files(folder: Path) -> list[Path]:
    """The files of a Hugging Face folder without safetensors.

    Raises:
        ConvertError: the index names one that is missing, or lies elsewhere.
    """
    index = folder / BIN_INDEX_FILE
    if index.exists():
        return indexed_files(index)
    whole = folder / "pytorch_model.bin"
    return [whole] if whole.exists() else sorted(folder.glob("pytorch_model*.bin"))


def has_safetensors(folder: Path) -> bool:
    """Whether a Hugging Face folder's weights are in safetensors."""
    return any(folder.glob("*.safetensors"))


def _describe_meta(path: Path) -> CheckpointInfo:
    shards = sorted(p for p in path.iterdir() if re.fullmatch(r"consolidated\.\d\d\.pth", p.name))
    embedding = _tensor(pickled_tensors(shards[0]), EMBEDDING, shards[0])
    params_path = path / "params.json"
    params = read_json_object(params_path)
    try:
        dim = ModelArgs.from_params({**params, "vocab_size": 1}).dim
        # Rows are cut in Llama-3.x, columns before it; one shard has all of both.
        cut_by_rows = len(embedding.shape) == 2 and embedding.shape[1] == dim
        rows = embedding.shape[0] * (len(shards) if cut_by_rows else 1)
        args = ModelArgs.from_params(params, vocab_size=rows)
    except ModelArgsError as e:
        raise ConvertError(f"{params_path}: {e}") from None
    source = {"kind": Kind.META.value, "model_parallel_size": len(shards)}
    return _info(path, args, _dtype(embedding, shards[0]), source)


def _describe_hf(path: Path) -> CheckpointInfo:
    config_path = path / CONFIG_FILE
    config = read_json_object(config_path)
    args = args_from_config(config_path, config)
    name = HF_NAMES[EMBEDDING]
    form = "safetensors" if has_safetensors(path) else "bin"
    dtypes: dict[str, str | None] = {}
    if form == "safetensors":
        for file in find_files(path):
            dtypes |= {n: DTYPES.get(e.dtype) for n, e in read_header(file).items() if n == name}
    else:
        for file in bin_files(path):
            dtypes |= {n: t.dtype for n, t in pickled_tensors(file).items() if n == name}
    dtype = dtypes.get(name)
    if dtype is None:
        said = "is missing" if name not in dtypes else "is not float32, float16 or bfloat16"
        raise ConvertError(f"{path}: {name} {said}")
    return _info(path, args, dtype, {"kind": Kind.HUGGING_FACE.value, "form": form}, config)


def _describe_gguf(path: Path) -> CheckpointInfo:
    header = read_gguf_header(gguf_file(path))
    args = args_from_gguf(header)
    metadata = header.metadata
    return CheckpointInfo(
        args,
        dtype_name(header),
        header.path.name if "tokenizer.ggml.tokens" in metadata else None,
        _token_id(metadata, "tokenizer.ggml.bos_token_id"),
        _token_id(metadata, "tokenizer.ggml.eos_token_id"),
        source={"kind": Kind.GGUF.value, "embedding": header.tensors["token_embd.weight"].type_name},
    )


def _describe_legacy(path: Path) -> CheckpointInfo:
    metadata = path / ".metadata"
    embedding = dcp_tensor(metadata, EMBEDDING)
    args = read_legacy_args(path, embedding.shape[0] if embedding.shape else 0)
    return _info(path, args, _dtype(embedding, metadata), {"kind": Kind.LEGACY_DCP.value})


def _info(
    path: Path, args: ModelArgs, dtype: str, source: dict[str, Any], config: Mapping[str, Any] | None = None
) -> CheckpointInfo:
    """With the folder's tokenizer, or the one above it: Meta's download puts one above the folders of all sizes."""
    found = find_tokenizer(path, None, args.vocab_size)
    if found is None:
        bos, eos = (_token_id(config or {}, name) for name in ("bos_token_id", "eos_token_id"))
        return CheckpointInfo(args, dtype, None, bos, eos, source)
    name = found.name if (path / found.name).is_file() else str(path.absolute().parent / found.name)
    return CheckpointInfo(
        args, dtype, name, found.bos_token_id, found.eos_token_id, source, eos_token_ids=found.eos_token_ids
    )


def _tensor(tensors: Mapping[str, PickledTensor], name: str, path: Path) -> PickledTensor:
    if name not in tensors:
        raise ConvertError(f"{path}: {name} is missing; these are not the weights of a Llama")
    return tensors[name]


def _dtype(tensor: PickledTensor, path: Path) -> str:
    if tensor.dtype not in DTYPES.values():
        raise ConvertError(f"{path}: {EMBEDDING} is {tensor.dtype}; weights must be float32, float16 or bfloat16")
    return str(tensor.dtype)


def _token_id(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if isinstance(value, list):  # Llama-3.1: several tokens end a text
        value = value[0] if value else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

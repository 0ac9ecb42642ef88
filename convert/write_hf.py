"""Writes a folder that Hugging Face's `transformers` loads: `config.json`, sharded safetensors, the tokenizer's files.

Hugging Face rotates the halves of a head where Meta rotates neighbours, so the rows of `wq` and `wk` change places:
row 2i of a head becomes row i, row 2i + 1 becomes row i + head_dim / 2 (transformers,
models/llama/convert_llama_weights_to_hf.py, `permute`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tpserve.convert.hf_config import hf_name
from tpserve.convert.layout import EMBEDDING
from tpserve.convert.manifest import Manifest
from tpserve.convert.meta_params import is_llama3
from tpserve.convert.weights import Weight, row_blocks
from tpserve.convert.write_safetensors import write_file
from tpserve.model.args import ModelArgs
from tpserve.model.plan import parameter_kind

MAX_SHARD_BYTES = 5_000_000_000  # what `transformers` itself has long written
INDEX_FILE = "model.safetensors.index.json"
HEAD = "output.weight"
_TIED = "tie_word_embeddings"


def write_hf(
    folder: Path,
    args: ModelArgs,
    tensors: Sequence[Weight],
    dtype: torch.dtype,
    manifest: Manifest,
    on_bytes: Callable[[int], object] = lambda n: None,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    eos_token_ids: Sequence[int] = (),
    max_seq_len: int | None = None,
) -> None:
    """Writes the weights and the configuration; the tokenizer's files are the caller's.

    Args:
        folder: an empty folder.
        args: the network's numbers.
        tensors: every parameter.
        dtype: of the stored weights.
        manifest: is told of every file.
        on_bytes: called with the size of every block once it is written.
        bos_token_id, eos_token_id: None: there is none.
        eos_token_ids: all that end a turn, where there are more.
        max_seq_len: positions the model was trained for; None: those of its generation.

    Raises:
        ConvertError: a weight does not fit into `dtype`; the message names it.
        OSError: of the disk.
    """
    by_name = {hf_name(t.name): t for t in tensors}
    tied = _are_equal(by_name[hf_name(EMBEDDING)], by_name[hf_name(HEAD)], dtype)
    if tied:
        head = by_name.pop(hf_name(HEAD))
        on_bytes(torch.Size(head.shape).numel() * dtype.itemsize)
    shards = _shards({name: t.shape for name, t in by_name.items()}, dtype)
    index: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"

        def blocks(name: str) -> Iterator[torch.Tensor]:
            return _blocks(by_name[name], args.head_dim, dtype)

        write_file(folder / file, shapes, blocks, dtype, manifest, on_bytes)
        index |= dict.fromkeys(shapes, file)
    if len(shards) > 1:
        total = sum(torch.Size(t.shape).numel() for t in by_name.values()) * dtype.itemsize
        _write_json(manifest, INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": index})
    ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    config = hf_config(args, dtype, tied, max_seq_len) | ids
    _write_json(manifest, "config.json", config)
    ends = {"eos_token_id": list(eos_token_ids)} if len(eos_token_ids) > 1 else {}
    _write_json(manifest, "generation_config.json", {n: i for n, i in (ids | ends).items() if i is not None})


def hf_config(args: ModelArgs, dtype: torch.dtype, tied: bool, max_seq_len: int | None = None) -> dict[str, Any]:
    """The content of `config.json`, in the fields that `transformers` 4 and 5 both read."""
    scaling = None
    if args.use_scaled_rope:
        scaling = {
            "rope_type": "llama3",
            "factor": args.rope_scale_factor,
            "low_freq_factor": args.rope_low_freq_factor,
            "high_freq_factor": args.rope_high_freq_factor,
            "original_max_position_embeddings": args.rope_original_context_tokens,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": max_seq_len or _trained_positions(args),
        "rms_norm_eps": args.norm_eps,
        "rope_theta": float(args.rope_theta),
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        _TIED: tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def tokenizer_config(model: bytes) -> bytes:
    """`tokenizer_config.json` for Llama's SentencePiece model: how `transformers` is to use it."""
    from sentencepiece import SentencePieceProcessor  # only here: `convert` works without a tokenizer, too

    pieces = SentencePieceProcessor(model_proto=model)
    ids = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
    fields = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": pieces.bos_id() >= 0,
        "add_eos_token": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        **{name: pieces.id_to_piece(i) for name, i in ids.items() if i >= 0},
    }
    return (json.dumps(fields, indent=2) + "\n").encode()


def _trained_positions(args: ModelArgs) -> int:
    """The context of the model's generation; Meta's files do not tell it."""
    if args.use_scaled_rope:
        return 16 * args.rope_original_context_tokens  # Llama 3.1: 131,072
    if is_llama3(args):
        return 8192
    return 16384 if args.rope_theta == 1e6 else 4096  # Code Llama; Llama-2


def _are_equal(a: Weight, b: Weight, dtype: torch.dtype) -> bool:
    """Whether two parameters are the same bits; the first difference ends it."""
    pairs = zip(row_blocks(a, dtype), row_blocks(b, dtype), strict=True)
    return a.shape == b.shape and all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def _shards(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> list[dict[str, tuple[int, ...]]]:
    """The tensors in their order, cut into files of at most `MAX_SHARD_BYTES` (or of one tensor)."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    return shards


def _blocks(tensor: Weight, head_dim: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A parameter's rows in Hugging Face's order."""
    if parameter_kind(tensor.name) not in ("attention.wq.weight", "attention.wk.weight"):
        yield from row_blocks(tensor, dtype)
        return
    for block in row_blocks(tensor, dtype, unit=head_dim):
        yield block.view(-1, head_dim // 2, 2, block.shape[1]).transpose(1, 2).reshape(block.shape)


def _write_json(manifest: Manifest, name: str, fields: Mapping[str, Any]) -> None:
    manifest.write_bytes(name, (json.dumps(fields, indent=2) + "\n").encode())

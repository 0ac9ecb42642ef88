"""Writes small checkpoints the way other people's tools do, from full weights under Meta's names."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

# Written out once more on purpose: a mistake in the converter's table must not repeat itself here.
_HF = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_GGUF = {
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip


def hf_weights(weights: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """Hugging Face's names, queries' and keys' rows in the order that rotate-half wants."""
    found = {}
    for name, weight in weights.items():
        kind = name.removesuffix(".weight")
        prefix = ""
        if kind.startswith("layers."):
            _, layer, kind = kind.split(".", 2)
            prefix = f"model.layers.{layer}."
        if kind in ("attention.wq", "attention.wk"):
            weight = weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        found[f"{prefix}{_HF[kind]}.weight"] = weight.contiguous()
    return found


def hf_config(params: Mapping[str, Any], weights: Mapping[str, Tensor], **more: object) -> dict[str, Any]:
    """A `config.json` as transformers 4 writes it; `more` goes over it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": params["dim"],
        "intermediate_size": weights["layers.0.feed_forward.w1.weight"].shape[0],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "vocab_size": weights["tok_embeddings.weight"].shape[0],
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", 10000.0),
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
        **more,
    }


def write_hf(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    form: str = "safetensors",
    num_files: int = 1,
) -> None:
    """Writes `config.json` and weights that already have Hugging Face's names.

    Args:
        folder: made when it does not exist.
        weights: see `hf_weights`.
        config: see `hf_config`.
        form: "safetensors" or "bin".
        num_files: more than one: with an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, suffix = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    names, weight_map = list(weights), {}
    for i in range(num_files):
        file = f"{stem}.{suffix}" if num_files == 1 else f"{stem}-{i + 1:05d}-of-{num_files:05d}.{suffix}"
        part = {name: weights[name].clone() for name in names[i::num_files]}
        weight_map |= dict.fromkeys(part, file)
        if form == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if num_files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def gguf_name(name: str) -> str:
    """GGUF's name of Meta's parameter."""
    kind = name.removesuffix(".weight")
    if not kind.startswith("layers."):
        return f"{_GGUF[kind]}.weight"
    _, layer, kind = kind.split(".", 2)
    return f"blk.{layer}.{_GGUF[kind]}.weight"


def write_gguf(
    path: Path,
    params: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    quantised: str = "F32",
    *,
    rope_factors: np.ndarray | None = None,
    architecture: str = "llama",
    more: Mapping[str, int | str | list[str] | list[int]] | None = None,
) -> dict[str, Tensor]:
    """Writes a .gguf file by the `gguf` package, matrices as `quantised`, norms as F32.

    Returns:
        What the file holds, dequantised in one piece, by Meta's names.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(params["n_layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(params["dim"])
    writer.add_feed_forward_length(weights["layers.0.feed_forward.w1.weight"].shape[0])
    writer.add_head_count(params["n_heads"])
    writer.add_head_count_kv(params.get("n_kv_heads") or params["n_heads"])
    writer.add_layer_norm_rms_eps(params["norm_eps"])
    writer.add_rope_freq_base(params.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(params["dim"] // params["n_heads"])
    for key, value in (more or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    stored = {}
    for name, weight in weights.items():
        kind = gguf.GGMLQuantizationType[quantised if weight.ndim > 1 else "F32"]
        data = gguf.quants.quantize(weight.float().numpy(), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
        stored[name] = torch.from_numpy(gguf.quants.dequantize(data, kind).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def write_legacy_dcp(folder: Path, weights: Mapping[str, Tensor], ranks: int = 2) -> None:
    """What the old tp_llama example's script left when torch 2.1 ran it on `ranks` GPUs: DTensors cut along dim 0."""
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    files = [(folder / f"__{rank}_0.distcp").open("wb") for rank in range(ranks)]
    for name, weight in {**weights, "rope.freqs": torch.ones(4)}.items():
        chunks, row = [], 0
        for rank, part in enumerate(weight.chunk(ranks)):
            file = files[rank]
            offset = file.tell()
            torch.save(part.clone(), file)
            begin = torch.Size([row] + [0] * (weight.ndim - 1))
            chunks.append(ChunkStorageMetadata(begin, part.shape))
            index = MetadataIndex(name, begin)
            storage[index] = _StorageInfo(f"__{rank}_0.distcp", offset, file.tell() - offset)
            row += part.shape[0]
        properties: Any = TensorProperties(dtype=weight.dtype)
        state[name] = TensorStorageMetadata(properties, weight.shape, chunks)
    for file in files:
        file.close()
    metadata = Metadata(state, {name: (name,) for name in state}, storage)
    for name in ("storage_meta", "version"):  # younger than torch 2.1
        metadata.__dict__.pop(name, None)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))

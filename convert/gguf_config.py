"""GGUF's metadata → `ModelArgs`, and GGUF's parameter names. Free of torch."""

from __future__ import annotations

import math
import re
import struct
from typing import Any

from tpserve.convert.errors import ConvertError
from tpserve.convert.gguf_header import GgufArray, GgufHeader
from tpserve.model.args import ModelArgs, ModelArgsError

# Meta's parameter kinds under GGUF's names; those of a layer stand behind `blk.N.`. Queries and keys of architecture
# "llama" are in Meta's order: llama.cpp's converter takes Hugging Face's permutation back.
GGUF_NAMES = {
    "tok_embeddings.weight": "token_embd.weight",
    "attention.wq.weight": "attn_q.weight",
    "attention.wk.weight": "attn_k.weight",
    "attention.wv.weight": "attn_v.weight",
    "attention.wo.weight": "attn_output.weight",
    "attention_norm.weight": "attn_norm.weight",
    "feed_forward.w1.weight": "ffn_gate.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
    "feed_forward.w3.weight": "ffn_up.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}
EMBEDDING, ROPE_FACTORS = "token_embd.weight", "rope_freqs.weight"
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Those of Llama 3.1 to 3.3; the file holds what comes out of them, not themselves.
_LOW, _HIGH, _CONTEXT_TOKENS = 1.0, 4.0, 8192
_TOLERANCE = 1e-3


def gguf_name(meta_name: str) -> str:
    """`layers.3.attention.wq.weight` → `blk.3.attn_q.weight`."""
    layer = re.match(r"layers\.(\d+)\.", meta_name)
    return f"blk.{layer[1]}.{GGUF_NAMES[meta_name[layer.end() :]]}" if layer else GGUF_NAMES[meta_name]


def dtype_name(header: GgufHeader) -> str:
    """Of the model: the embedding's, or bfloat16 where that is quantised: its range holds whatever comes out."""
    return _PLAIN.get(header.tensors[EMBEDDING].type_name, "bfloat16")


def args_from_gguf(header: GgufHeader) -> ModelArgs:
    """The numbers of the network.

    Raises:
        ConvertError: it is no Llama, or one with something that the network here does not have; names the key.
    """
    path = header.path
    architecture = header.metadata.get("general.architecture")
    if architecture != "llama":
        raise ConvertError(f"{path}: general.architecture is {architecture!r}; only 'llama' is read")
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise ConvertError(f"{path}: {EMBEDDING} is missing; is this a model, or only its vocabulary?")
    _check_features(header)
    heads = _number(header, "attention.head_count", None)
    rows = embedding.shape[0]
    vocab_size = _number(header, "vocab_size", rows)
    if vocab_size > rows:
        raise ConvertError(f"{path}: llama.vocab_size is {vocab_size}, but {EMBEDDING} has {rows} rows")
    fields: dict[str, Any] = {
        "dim": _number(header, "embedding_length", None),
        "n_layers": _number(header, "block_count", None),
        "n_heads": heads,
        "n_kv_heads": _number(header, "attention.head_count_kv", heads),
        "vocab_size": vocab_size,
        "ffn_hidden_dim": _number(header, "feed_forward_length", None),
        "norm_eps": _decimal(header.metadata.get("llama.attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": _decimal(header.metadata.get("llama.rope.freq_base", 10000.0)),
    }
    try:
        args = ModelArgs.from_dict(fields)
        for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
            width = _number(header, key, args.head_dim)
            if width != args.head_dim:
                raise ConvertError(f"{path}: llama.{key} is {width}, but the heads are {args.head_dim} wide")
        return ModelArgs.from_dict(fields | _rope_scaling(header, args))
    except ModelArgsError as e:
        raise ConvertError(f"{path}: {e}") from None


def _check_features(header: GgufHeader) -> None:
    scaling = header.metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none" and header.metadata.get("llama.rope.scaling.factor", 0) != 1:
        raise ConvertError(f"{header.path}: llama.rope.scaling.type is {scaling!r}, which is not supported")
    if "llama.rope.scale_linear" in header.metadata and header.metadata["llama.rope.scale_linear"] != 1:
        raise ConvertError(f"{header.path}: llama.rope.scale_linear is not supported")
    for key in ("expert_count", "attention.sliding_window"):
        if header.metadata.get(f"llama.{key}", 0):
            raise ConvertError(f"{header.path}: llama.{key} is {header.metadata[f'llama.{key}']}: not a plain Llama")


def _number(header: GgufHeader, key: str, default: int | None) -> int:
    value = header.metadata.get(f"llama.{key}", default)
    if isinstance(value, GgufArray):
        items = set(header.array(f"llama.{key}"))  # one value a layer
        value = items.pop() if len(items) == 1 else sorted(items)
    if isinstance(value, bool) or not isinstance(value, int):
        said = "is missing" if value is None else f"is {value!r}, not one number"
        raise ConvertError(f"{header.path}: llama.{key} {said}")
    return value


def _decimal(value: Any) -> Any:
    """What was meant by a float32: 9.999999747378752e-06 → 1e-05."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _rope_scaling(header: GgufHeader, args: ModelArgs) -> dict[str, Any]:
    """Llama 3.1's frequency scaling, recognised by the factors that the file holds: one for each pair of a head.

    Raises:
        ConvertError: they are another scaling's.
    """
    tensor = header.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return {}
    pairs = args.head_dim // 2
    if tensor.type_name != "F32" or tensor.shape != (pairs,):
        raise ConvertError(f"{header.path}: {ROPE_FACTORS} is {tensor.type_name} {tensor.shape}, not F32 ({pairs},)")
    with header.path.open("rb") as f:
        f.seek(tensor.offset)
        factors = struct.unpack(f"<{pairs}f", f.read(4 * pairs))
    factor = _decimal(max(factors))
    if all(abs(value - 1) < _TOLERANCE for value in factors):
        return {}
    for i, value in enumerate(factors):
        wavelength = 2 * math.pi * args.rope_theta ** (2 * i / args.head_dim)
        smooth = min(1.0, max(0.0, (_CONTEXT_TOKENS / wavelength - _LOW) / (_HIGH - _LOW)))
        expected = 1 / ((1 - smooth) / factor + smooth) if factor > 0 else math.inf
        if not abs(value - expected) <= _TOLERANCE * expected:
            raise ConvertError(
                f"{header.path}: {ROPE_FACTORS}[{i}] is {value:.6g}, Llama 3.1's scaling by {factor:g} makes it "
                f"{expected:.6g}; other scalings are not supported"
            )
    return {
        "use_scaled_rope": True,
        "rope_scale_factor": factor,
        "rope_low_freq_factor": _LOW,
        "rope_high_freq_factor": _HIGH,
        "rope_original_context_tokens": _CONTEXT_TOKENS,
    }

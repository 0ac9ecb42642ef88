"""Hugging Face's `config.json` → `ModelArgs`, and Hugging Face's parameter names. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpserve.convert.errors import ConvertError
from tpserve.model.args import ModelArgs, ModelArgsError

CONFIG_FILE = "config.json"
# Meta's parameter kinds under Hugging Face's names; those of a layer stand behind `model.layers.N.`.
HF_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Mistral is the same network as long as attention sees everything before it.
_ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM")
_LLAMA3_FIELDS = {
    "factor": "rope_scale_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_context_tokens",
}


def hf_name(meta_name: str) -> str:
    """`layers.3.attention.wq.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    layer = re.match(r"layers\.\d+\.", meta_name)
    return f"model.{layer[0]}{HF_NAMES[meta_name[layer.end() :]]}" if layer else HF_NAMES[meta_name]


def is_hf_buffer(name: str) -> bool:
    """Whether old files hold `name` although it is not a weight: the rotary frequencies, made from `rope_theta`."""
    return name.endswith(".rotary_emb.inv_freq")


def args_from_config(path: Path, config: Mapping[str, Any]) -> ModelArgs:
    """The numbers of the network that a `config.json` describes.

    Args:
        path: of the file, for messages.
        config: its content.

    Raises:
        ConvertError: it is no Llama, or one with something that the network here does not have; names the field.
    """
    _check_architecture(path, config)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"):
        if name not in config:
            raise ConvertError(f"{path}: {name} is missing; is this the config.json of a Llama?")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads")
    fields = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": heads if kv_heads is None else kv_heads,
        "vocab_size": config["vocab_size"],
        "ffn_hidden_dim": config["intermediate_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),  # transformers' default, not Meta's
        **_rope(path, config),
    }
    try:
        args = ModelArgs.from_dict(fields)
    except ModelArgsError as e:
        raise ConvertError(f"{path}: {e}") from None
    head_dim = config.get("head_dim")
    if head_dim is not None and head_dim != args.head_dim:
        raise ConvertError(
            f"{path}: head_dim is {head_dim}, but hidden_size / num_attention_heads is {args.head_dim}; "
            "models whose heads have another width are not read"
        )
    return args


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output matrix is the embedding."""
    return config.get("tie_word_embeddings") is True


def _check_architecture(path: Path, config: Mapping[str, Any]) -> None:
    architectures = config.get("architectures")
    if architectures is None:
        architectures = {"llama": ["LlamaForCausalLM"], "mistral": ["MistralForCausalLM"]}.get(
            str(config.get("model_type")), [f"model_type {config.get('model_type')!r}"]
        )
    if not isinstance(architectures, list) or not any(a in _ARCHITECTURES for a in architectures):
        names = ", ".join(map(str, architectures)) if isinstance(architectures, list) else repr(architectures)
        raise ConvertError(
            f"{path}: architectures is {names}; only Llama is read (LlamaForCausalLM, or Mistral's like)"
        )
    unsupported = {
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "sliding_window": (None,),
        "quantization_config": (None,),
        "partial_rotary_factor": (1, 1.0, None),
        "hidden_act": ("silu", None),
    }
    for name, harmless in unsupported.items():
        value = config.get(name)
        if value not in harmless and not (name == "sliding_window" and config.get("use_sliding_window") is False):
            shown = value.get("quant_method", value) if isinstance(value, dict) else value
            remedy = "; take the model's unquantised files" if name == "quantization_config" else ""
            raise ConvertError(f"{path}: {name} is {shown!r}, which this Llama does not have{remedy}")


def _rope(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, or `rope_parameters`, which transformers 5 writes in their place."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ConvertError(f"{path}: rope_scaling is {scaling!r}, not an object")
    theta = scaling.get("rope_theta", config.get("rope_theta"))
    fields: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default" or (kind == "linear" and scaling.get("factor") == 1):
        return fields
    if kind != "llama3":
        raise ConvertError(f"{path}: rope_scaling of type {kind!r} is not supported; only llama3's is")
    fields["use_scaled_rope"] = True
    for name, ours in _LLAMA3_FIELDS.items():
        value = scaling.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConvertError(f"{path}: rope_scaling's {name} must be a positive number, got {value!r}")
        fields[ours] = value
    if not fields["rope_low_freq_factor"] < fields["rope_high_freq_factor"]:
        raise ConvertError(f"{path}: rope_scaling's low_freq_factor must be below its high_freq_factor")
    return fields

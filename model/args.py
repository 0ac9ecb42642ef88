"""The numbers that define a Llama: read from Meta's `params.json`, checked, and kept in `model.json`."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Width and layers of Llama 3.2's 1B and 3B. Their frequencies are scaled by 32, the others' by 8; of all of them Meta's
# params.json says use_scaled_rope only (transformers, convert_llama_weights_to_hf.py: "factor" by release; the
# config.json of meta-llama/Llama-3.2-1B and -3B).
_SCALED_BY_32 = frozenset({(2048, 16), (3072, 28)})
# Fields of Meta's params.json that configure their runtime rather than the network: accepted and dropped.
_RUNTIME_FIELDS = frozenset({"max_batch_size", "max_seq_len", "model_parallel_size", "use_kv_cache"})


class ModelArgsError(ValueError):
    """A `params.json` or `model.json` that does not describe a Llama; the message names the field."""


@dataclasses.dataclass(frozen=True)
class ModelArgs:
    """Shape and constants of one Llama network.

    Attributes:
        dim: width of the residual stream.
        n_layers: number of transformer blocks.
        n_heads: query heads.
        n_kv_heads: key/value heads; divides `n_heads` (grouped-query attention).
        vocab_size: rows of the embedding and of the output matrix.
        ffn_hidden_dim: width of the feed-forward block.
        norm_eps: epsilon of RMSNorm.
        rope_theta: base of the rotary frequencies.
        use_scaled_rope: apply Llama 3.1's frequency scaling.
        rope_scale_factor, rope_low_freq_factor, rope_high_freq_factor, rope_original_context_tokens:
            constants of that scaling (Llama 3.1: 8, 1, 4, 8192; 3.2: 32).
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    ffn_hidden_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False
    rope_scale_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_context_tokens: int = 8192

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "ffn_hidden_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelArgsError(f"{name} must be a positive integer, got {value!r}")
        for name in ("norm_eps", "rope_theta", "rope_scale_factor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ModelArgsError(f"{name} must be a positive number, got {value!r}")
        if self.dim % self.n_heads:
            raise ModelArgsError(f"n_heads ({self.n_heads}) does not divide dim ({self.dim})")
        if self.head_dim % 2:
            raise ModelArgsError(f"dim / n_heads ({self.head_dim}) is odd: rotary embedding rotates pairs")
        if self.n_heads % self.n_kv_heads:
            raise ModelArgsError(f"n_kv_heads ({self.n_kv_heads}) does not divide n_heads ({self.n_heads})")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @classmethod
    def from_params(cls, params: Mapping[str, Any], *, vocab_size: int | None = None) -> ModelArgs:
        """Reads the fields of Meta's `params.json` (LLaMA-1, Llama-2, Code Llama, Llama-3.x).

        Args:
            params: the parsed file.
            vocab_size: rows of `tok_embeddings` in the checkpoint; takes the place of the file's -1.

        Raises:
            ModelArgsError: a field is missing, unknown, or impossible.
        """
        fields = dict(params)
        for name in _RUNTIME_FIELDS:
            fields.pop(name, None)
        for name in ("dim", "n_layers", "n_heads"):
            if name not in fields:
                raise ModelArgsError(f"required field {name!r} is missing")
        multiple_of, multiplier = fields.pop("multiple_of", 256), fields.pop("ffn_dim_multiplier", None)
        if not isinstance(multiple_of, int) or multiple_of < 1:
            raise ModelArgsError(f"multiple_of must be a positive integer, got {multiple_of!r}")
        if multiplier is not None and (not isinstance(multiplier, int | float) or not 0 < multiplier < 100):
            raise ModelArgsError(f"ffn_dim_multiplier must be a positive number, got {multiplier!r}")
        if fields.get("n_kv_heads") is None:
            fields["n_kv_heads"] = fields["n_heads"]
        if fields.get("rope_theta") is None:
            fields.pop("rope_theta", None)
        if fields.get("use_scaled_rope") and fields.get("rope_scale_factor") is None:
            fields["rope_scale_factor"] = scale_factor(fields["dim"], fields["n_layers"])
        declared = fields.pop("vocab_size", -1)
        if vocab_size is not None and declared not in (-1, vocab_size):
            raise ModelArgsError(f"vocab_size is {declared} but tok_embeddings has {vocab_size} rows")
        fields["vocab_size"] = declared if vocab_size is None else vocab_size
        if isinstance(fields["dim"], int):
            fields["ffn_hidden_dim"] = ffn_hidden_dim(fields["dim"], multiple_of, multiplier)
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelArgs:
        """Builds from this class's own field names; an unknown one is an error that names the nearest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ModelArgsError(f"unknown field {name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        try:
            return cls(**fields)
        except TypeError as e:
            raise ModelArgsError(str(e).replace("ModelArgs.__init__() ", "")) from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; `from_dict` takes them back."""
        return dataclasses.asdict(self)


def ffn_hidden_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward block, by the rule of Meta's `FeedForward.__init__` (llama/model.py)."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def scale_factor(dim: Any, n_layers: Any) -> float:
    """The `rope_scale_factor` that Meta's releases mean by `use_scaled_rope` alone."""
    return 32.0 if (dim, n_layers) in _SCALED_BY_32 else ModelArgs.rope_scale_factor


def read_params_json(path: Path) -> dict[str, Any]:
    """Parses a `params.json`.

    Raises:
        ModelArgsError: it is not a JSON object; the message names the file.
    """
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, a number of ten thousand digits, or too deep
        raise ModelArgsError(f"{path} is not JSON ({e})") from None
    if not isinstance(params, dict):
        raise ModelArgsError(f"{path} holds a JSON {type(params).__name__}, not an object")
    return params

"""`params.json` for a given network: the fields of Meta's `ModelArgs` from which their code makes the same shapes."""

from __future__ import annotations

from typing import Any

from tpserve.convert.errors import ConvertError
from tpserve.model.args import ModelArgs, ffn_hidden_dim, scale_factor

# Values of Meta's own files, tried first.
_MULTIPLES = (256, 4096, 1024, 512, 128, 64, 32)
_MULTIPLIERS = (None, 1.3, 1.5, 1.4, 1.2, 1.0)
_SCALED_ROPE_FIELDS = (
    "rope_scale_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_context_tokens",
)  # fmt: skip


def is_llama3(args: ModelArgs) -> bool:
    """Whether the numbers are of Llama 3's generation: a vocabulary of 128,256, and theta 500,000 from its release on.

    Its code cuts the embedding by rows (VocabParallelEmbedding), the earlier ones' by columns.
    """
    return args.use_scaled_rope or args.rope_theta == 500000.0 or args.vocab_size >= 128000


def params_of(args: ModelArgs) -> dict[str, Any]:
    """The content of `params.json`; fields that older code does not know appear only where they are needed.

    Raises:
        ConvertError: no rule of Meta's gives this feed-forward width.
    """
    params: dict[str, Any] = {"dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads}
    if args.n_kv_heads != args.n_heads:
        params["n_kv_heads"] = args.n_kv_heads
    params["vocab_size"] = args.vocab_size
    multiple_of, multiplier = ffn_rule(args.dim, args.ffn_hidden_dim)
    params["multiple_of"] = multiple_of
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    params["norm_eps"] = args.norm_eps
    if args.rope_theta != ModelArgs.rope_theta:
        params["rope_theta"] = args.rope_theta
    if args.use_scaled_rope:
        params["use_scaled_rope"] = True
        # Constants of Meta's releases; where a model has others, their code refuses the field rather than be wrong.
        usual = {name: getattr(ModelArgs, name) for name in _SCALED_ROPE_FIELDS}
        usual["rope_scale_factor"] = scale_factor(args.dim, args.n_layers)
        params |= {name: getattr(args, name) for name in _SCALED_ROPE_FIELDS if getattr(args, name) != usual[name]}
    return params


def ffn_rule(dim: int, width: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) from which Meta's rule makes `width`; round numbers where there are any.

    Raises:
        ConvertError: there is none (the width is a hundred times the usual one, or more).
    """
    for multiplier in _MULTIPLIERS:
        for multiple in _MULTIPLES:
            if ffn_hidden_dim(dim, multiple, multiplier) == width:
                return multiple, multiplier
    # Any width that is its own only multiple: without a multiplier when the rule rounds up to it, else one that is
    # rounded to as few places as will do.
    for multiple in (n for n in range(width, 0, -1) if width % n == 0):
        if ffn_hidden_dim(dim, multiple, None) == width:
            return multiple, None
    ratio = width / int(2 * (4 * dim) / 3)
    for places in range(1, 16):
        multiplier = round(ratio + 0.5 * 10**-places, places)
        multiple = next((n for n in _MULTIPLES if ffn_hidden_dim(dim, n, multiplier) == width), 1)
        if 0 < multiplier < 100 and ffn_hidden_dim(dim, multiple, multiplier) == width:
            return multiple, multiplier
    raise ConvertError(f"no multiple_of and ffn_dim_multiplier of params.json give a feed-forward width of {width}")

"""How Meta's Fairscale checkpoints are cut: names, global shapes, and the dimension along which shards are joined."""

from __future__ import annotations

import re

from tpserve.convert.errors import ConvertError
from tpserve.model.args import ModelArgs
from tpserve.model.plan import parameter_kind

# ColumnParallelLinear cut its weight on dim 0, RowParallelLinear on dim 1; None: every shard holds all of it. The
# embedding is not here: two of Fairscale's layers were in use, see `embedding_shard_dim`.
FAIRSCALE_DIM: dict[str, int | None] = {
    "attention.wq.weight": 0,
    "attention.wk.weight": 0,
    "attention.wv.weight": 0,
    "attention.wo.weight": 1,
    "attention_norm.weight": None,
    "feed_forward.w1.weight": 0,
    "feed_forward.w2.weight": 1,
    "feed_forward.w3.weight": 0,
    "ffn_norm.weight": None,
    "norm.weight": None,
    "output.weight": 0,
}

EMBEDDING = "tok_embeddings.weight"

# Buffers of Meta's runtime, recomputed from `rope_theta` by ours (LLaMA-1 7B has one in every layer).
_DROPPED = re.compile(r"rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs")


def is_dropped(name: str) -> bool:
    """Whether Meta's files may hold `name` although it is not a weight."""
    return _DROPPED.fullmatch(name) is not None


def parameter_names(n_layers: int) -> list[str]:
    """Every parameter of a Llama with `n_layers` blocks, in the order in which they are written."""
    in_layer = [kind for kind in FAIRSCALE_DIM if kind not in ("norm.weight", "output.weight")]
    layers = [f"layers.{i}.{kind}" for i in range(n_layers) for kind in in_layer]
    return [EMBEDDING, *layers, "norm.weight", "output.weight"]


def global_shape(name: str, args: ModelArgs) -> tuple[int, ...]:
    """Shape of the whole, uncut parameter.

    Raises:
        KeyError: no Llama has a parameter of that name.
    """
    kv_dim = args.n_kv_heads * args.head_dim
    return {
        "tok_embeddings.weight": (args.vocab_size, args.dim),
        "attention.wq.weight": (args.dim, args.dim),
        "attention.wk.weight": (kv_dim, args.dim),
        "attention.wv.weight": (kv_dim, args.dim),
        "attention.wo.weight": (args.dim, args.dim),
        "attention_norm.weight": (args.dim,),
        "feed_forward.w1.weight": (args.ffn_hidden_dim, args.dim),
        "feed_forward.w2.weight": (args.dim, args.ffn_hidden_dim),
        "feed_forward.w3.weight": (args.ffn_hidden_dim, args.dim),
        "ffn_norm.weight": (args.dim,),
        "norm.weight": (args.dim,),
        "output.weight": (args.vocab_size, args.dim),
    }[parameter_kind(name)]


def embedding_shard_dim(shape: tuple[int, ...], dim: int, n_shards: int) -> int:
    """Along which dimension the embedding was cut, told from one shard's shape.

    `ParallelEmbedding` (LLaMA-1, Llama-2, Code Llama) leaves (vocab, dim / n), `VocabParallelEmbedding` (Llama-3.x)
    (vocab / n, dim). With one shard both are the whole matrix.

    Raises:
        ConvertError: the shape is neither; the message says what that points to.
    """
    if len(shape) == 2 and shape[1] * n_shards == dim:
        return 1
    if len(shape) == 2 and shape[1] == dim:
        return 0
    message = f"{EMBEDDING} is {format_shape(shape)}, but params.json says dim {dim} and there are {n_shards} shards"
    if len(shape) == 2 and shape[1] and dim % shape[1] == 0:
        n_likely = dim // shape[1]
        raise ConvertError(f"{message}: are some of {n_likely} shards missing, or is params.json another model's?")
    raise ConvertError(f"{message}: params.json and the shards belong to different models")


def format_shape(shape: tuple[int, ...]) -> str:
    """`(32000, 4096)` → `32000 x 4096`."""
    return " x ".join(map(str, shape)) if shape else "a scalar"

"""How each weight is split over tensor-parallel (TP) ranks: one table, read by the loader and by the converter.

Column-parallel weights (split on dim 0, the output features) need no communication in front of them; row-parallel
ones (split on dim 1, the input features) leave a partial sum that one all-reduce completes. A block therefore costs
two all-reduces, after `wo` and after `w2`, and the head one gather (Shoeybi et al., "Megatron-LM", 2019, section 3).
"""

from __future__ import annotations

# The dimension along which a weight is split over ranks; None: every rank holds all of it.
TP_DIM: dict[str, int | None] = {
    "tok_embeddings.weight": None,
    "attention.wq.weight": 0,
    "attention.wk.weight": 0,
    "attention.wv.weight": 0,
    "attention.wo.weight": 1,
    "attention_norm.weight": None,
    "feed_forward.w1.weight": 0,
    "feed_forward.w3.weight": 0,
    "feed_forward.w2.weight": 1,
    "ffn_norm.weight": None,
    "norm.weight": None,
    "output.weight": 0,
}


def parameter_kind(name: str) -> str:
    """The key of `TP_DIM` for a full parameter name: `layers.3.attention.wq.weight` → `attention.wq.weight`.

    Raises:
        KeyError: no Llama has a parameter of that name.
    """
    parts = name.split(".")
    kind = ".".join(parts[2:]) if parts[0] == "layers" and len(parts) > 2 and parts[1].isdecimal() else name
    in_layer = kind.startswith(("attention", "ffn_norm", "feed_forward"))
    if kind not in TP_DIM or in_layer != (kind != name):
        raise KeyError(name)
    return kind


def tp_dim(name: str) -> int | None:
    """The dimension along which the parameter `name` is split over TP ranks; None when it is replicated.

    Raises:
        KeyError: no Llama has a parameter of that name.
    """
    return TP_DIM[parameter_kind(name)]


def chunk_bounds(size: int, n_chunks: int) -> list[tuple[int, int]]:
    """Half-open bounds of `torch.chunk`'s pieces: ceil(size / n_chunks) each, the last shorter, empty ones left out.

    DTensor shards by the same rule, so a rank's slice of a tensor is `chunk_bounds(size, tp)[rank]`.
    """
    step = -(-size // n_chunks)
    return [(lo, min(lo + step, size)) for lo in range(0, size, step)]


def kv_mesh_shape(n_heads: int, n_kv_heads: int, tp_size: int) -> tuple[int, int]:
    """How the key/value heads are laid over the ranks: (groups that hold different heads, ranks that hold the same).

    Rank r holds query heads [r·n_heads/tp, …) and must hold the KV heads that those attend to. With more ranks than
    KV heads, `tp_size / n_kv_heads` neighbouring ranks hold copies of the same head.

    Raises:
        ValueError: this TP size cannot split the heads evenly; the message names sizes that can.
    """
    if tp_size >= 1 and n_heads % tp_size == 0:
        if n_kv_heads % tp_size == 0:
            return tp_size, 1
        if tp_size % n_kv_heads == 0:
            return n_kv_heads, tp_size // n_kv_heads
    sizes = [n for n in range(1, n_heads + 1) if n_heads % n == 0 and (n_kv_heads % n == 0 or n % n_kv_heads == 0)]
    raise ValueError(
        f"tensor-parallel size {tp_size} cannot split {n_heads} query heads and {n_kv_heads} key/value heads evenly; "
        f"possible sizes: {', '.join(map(str, sizes))}"
    )

"""How each weight is split over tensor-parallel (TP) ranks: one table, read by the loader and by the converter.

Column-parallel weights (split on dim 0, the output features) need no communication in front of them; row-parallel
ones (split on dim 1, the input features) leave a partial sum that one all-reduce completes. A block therefore costs
two all-reduces, after `wo` and after `w2`, and the head one gather (Shoeybi et al., "Megatron-LM", 2019, section 3).
"""

from __future__ import annotations

import dataclasses
import itertools

from tpserve.model.args import ModelArgs

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
# What a checkpoint holds in the place of a quantised weight (`quantized_format.py`): the dimension of each part that
# goes along the weight's dimensions 0 and 1; None: none does.
PART_DIMS: dict[str, tuple[int, int | None]] = {"q_NK": (0, 1), "scale_N": (0, None), "scale_GN2": (1, 0)}


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
    """The dimension along which a parameter, or a part of a quantised one, is split over TP ranks; None: it is not.

    Raises:
        KeyError: no Llama has a parameter of that name.
    """
    owner, _, part = name.rpartition(".")
    if part not in PART_DIMS:
        return TP_DIM[parameter_kind(name)]
    dim = TP_DIM[parameter_kind(f"{owner}.weight")]
    if dim is None:
        raise KeyError(name)
    return PART_DIMS[part][dim]


def chunk_bounds(size: int, n_chunks: int) -> list[tuple[int, int]]:
    """Half-open bounds of `torch.chunk`'s pieces: ceil(size / n_chunks) each, the last shorter, empty ones left out."""
    step = -(-size // n_chunks)
    return [(lo, min(lo + step, size)) for lo in range(0, size, step)]


def even_bounds(size: int, n_parts: int) -> list[tuple[int, int]]:
    """Half-open bounds of `n_parts` neighbouring parts whose sizes differ by one at most, larger ones first."""
    small, more = divmod(size, n_parts)
    starts = [part * small + min(part, more) for part in range(n_parts + 1)]
    return list(itertools.pairwise(starts))


@dataclasses.dataclass(frozen=True)
class Share:
    """What one rank holds; half-open ranges.

    Attributes:
        heads: query heads.
        kv_heads: key/value heads; as many query heads to each of them.
        ffn: columns of the feed-forward block.
        vocab: rows of the output matrix.
    """

    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    ffn: tuple[int, int]
    vocab: tuple[int, int]

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads that this rank keeps keys and values of."""
        return self.kv_heads[1] - self.kv_heads[0]

    def of(self, name: str, head_dim: int) -> tuple[int, int, int] | None:
        """This rank's slice of the parameter `name`: (dimension, first, end); None: all of it.

        Raises:
            KeyError: no Llama has a parameter of that name.
        """
        kind = parameter_kind(name)
        dim = TP_DIM[kind]
        if dim is None:
            return None
        unit = 1
        match kind.removesuffix(".weight").rpartition(".")[2]:
            case "wq" | "wo":
                (lo, hi), unit = self.heads, head_dim
            case "wk" | "wv":
                (lo, hi), unit = self.kv_heads, head_dim
            case "output":
                lo, hi = self.vocab
            case _:
                lo, hi = self.ffn
        return dim, lo * unit, hi * unit


def shares(args: ModelArgs, tp_size: int) -> list[Share]:
    """Every rank's share, for any number of ranks up to the number of query heads.

    Key/value heads are not cut. Up to as many ranks as there are of them, they are dealt out with all the query heads
    that read them; beyond, neighbouring ranks hold copies of one key/value head and deal out its query heads. Either
    way a rank's query heads have equally many to a key/value head.

    Raises:
        ValueError: there are more ranks than query heads, or than blocks of the feed-forward width.
    """
    if not 1 <= tp_size <= args.n_heads:
        raise ValueError(
            f"tensor-parallel size {tp_size} cannot split {args.n_heads} query heads; possible sizes: 1 to "
            f"{args.n_heads}"
        )
    if tp_size > args.ffn_hidden_dim:
        raise ValueError(f"tensor-parallel size {tp_size} cannot split {args.ffn_hidden_dim} feed-forward columns")
    unit = _ffn_unit(args.ffn_hidden_dim, tp_size)
    ffn = [(lo * unit, hi * unit) for lo, hi in even_bounds(args.ffn_hidden_dim // unit, tp_size)]
    vocab = chunk_bounds(args.vocab_size, tp_size)
    vocab += [(args.vocab_size, args.vocab_size)] * (tp_size - len(vocab))
    return [Share(*heads, *rest) for heads, *rest in zip(_heads(args, tp_size), ffn, vocab, strict=True)]


def _heads(args: ModelArgs, tp_size: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Each rank's (query heads, key/value heads)."""
    group = args.n_heads // args.n_kv_heads
    if tp_size <= args.n_kv_heads:
        return [((lo * group, hi * group), (lo, hi)) for lo, hi in even_bounds(args.n_kv_heads, tp_size)]
    return [
        ((kv * group + lo, kv * group + hi), (kv, kv + 1))
        for kv, (first, end) in enumerate(even_bounds(tp_size, args.n_kv_heads))
        for lo, hi in even_bounds(group, end - first)
    ]


def _ffn_unit(width: int, tp_size: int) -> int:
    """Columns that stay together: products read aligned rows faster."""
    units = [unit for unit in (64, 32, 16, 8, 4, 2, 1) if width % unit == 0 and width // unit >= tp_size]
    even = [unit for unit in units if width // unit % tp_size == 0]
    return even[0] if even and even[0] >= 8 else units[0]


def show_shares(args: ModelArgs, tp_size: int) -> str:
    """A table of who holds what, and how much more the fullest rank has than the average.

    Raises:
        ValueError: see `shares`.
    """
    every = shares(args, tp_size)
    lines = [f"{'rank':>4}  {'query heads':<14}{'kv heads':<12}{'feed-forward':<16}{'vocabulary':<16}{'weights':>9}"]
    weights = [_num_weights(args, share) for share in every]
    for rank, (share, count) in enumerate(zip(every, weights, strict=True)):
        spans = [_span(span) for span in (share.heads, share.kv_heads, share.ffn, share.vocab)]
        line = "".join(f"{span:<{width}}" for span, width in zip(spans, (14, 12, 16, 16), strict=True))
        lines.append(f"{rank:>4}  {line}{count / 1e6:>8.1f}M")
    excess = max(weights) * tp_size / sum(weights) - 1
    copies = sum(share.num_kv_heads for share in every) - args.n_kv_heads
    lines.append(
        f"the fullest rank holds {excess:.1%} more than the average; key/value heads held twice or more: {copies}"
    )
    return "\n".join(lines)


def _span(span: tuple[int, int]) -> str:
    return "none" if span[0] == span[1] else f"{span[0]}-{span[1] - 1}"


def _num_weights(args: ModelArgs, share: Share) -> int:
    """Of the parts that are split."""
    heads, ffn, vocab = (hi - lo for lo, hi in (share.heads, share.ffn, share.vocab))
    layer = args.dim * (2 * (heads + share.num_kv_heads) * args.head_dim + 3 * ffn)
    return args.n_layers * layer + vocab * args.dim

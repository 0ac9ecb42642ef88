"""Makes small Fairscale checkpoints: random Llamas, cut by hand the way Meta's files are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Two layers, grouped-query attention, an FFN width (88) and a vocabulary (90) that 8 does not or hardly divide.
TINY_PARAMS: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 4,
    "norm_eps": 1e-5,
    "vocab_size": 90,
}

# Written out once more on purpose: a mistake in the converter's table must not repeat itself here.
_CUT_DIM = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}


def random_weights(
    params: Mapping[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32, vocab_size: int = 90
) -> dict[str, Tensor]:
    """Full weights of a random Llama under Meta's names; activations keep a magnitude of about one.

    Args:
        params: as in `params.json`; its `vocab_size` is used unless it is missing or -1.
        seed: of the weights.
        dtype: of the weights.
        vocab_size: taken when `params` does not tell.
    """
    generator = torch.Generator().manual_seed(seed)
    dim, n_heads = params["dim"], params["n_heads"]
    kv_dim = dim // n_heads * (params.get("n_kv_heads") or n_heads)
    vocab = params.get("vocab_size", -1)
    vocab = vocab_size if vocab == -1 else vocab
    hidden = int(2 * 4 * dim / 3)
    if params.get("ffn_dim_multiplier"):
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    multiple = params.get("multiple_of", 256)
    hidden = -(-hidden // multiple) * multiple

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul(columns**-0.5).to(dtype)

    def norm() -> Tensor:
        return (1 + 0.1 * torch.randn(dim, generator=generator)).to(dtype)

    weights = {"tok_embeddings.weight": matrix(vocab, dim) * dim**0.5}
    for i in range(params["n_layers"]):
        weights |= {
            f"layers.{i}.attention.wq.weight": matrix(dim, dim),
            f"layers.{i}.attention.wk.weight": matrix(kv_dim, dim),
            f"layers.{i}.attention.wv.weight": matrix(kv_dim, dim),
            f"layers.{i}.attention.wo.weight": matrix(dim, dim),
            f"layers.{i}.feed_forward.w1.weight": matrix(hidden, dim),
            f"layers.{i}.feed_forward.w2.weight": matrix(dim, hidden),
            f"layers.{i}.feed_forward.w3.weight": matrix(hidden, dim),
            f"layers.{i}.attention_norm.weight": norm(),
            f"layers.{i}.ffn_norm.weight": norm(),
        }
    return weights | {"norm.weight": norm(), "output.weight": matrix(vocab, dim)}


def cut(weights: Mapping[str, Tensor], mp: int, embedding_dim: int = 1) -> list[dict[str, Tensor]]:
    """The `mp` shards of full weights, each with the `rope.freqs` buffer that Meta's files carry.

    Args:
        weights: by Meta's names.
        mp: model-parallel size.
        embedding_dim: 1 as in Llama-2 (ParallelEmbedding), 0 as in Llama-3 (VocabParallelEmbedding).
    """
    shards: list[dict[str, Tensor]] = [{} for _ in range(mp)]
    for name, weight in weights.items():
        key = name.split(".")[-2]
        dim = embedding_dim if key == "tok_embeddings" else _CUT_DIM.get(key)
        for rank, shard in enumerate(shards):
            if dim is None:
                shard[name] = weight.clone()
            else:
                assert weight.shape[dim] % mp == 0, (name, tuple(weight.shape), mp)
                size = weight.shape[dim] // mp
                shard[name] = weight.narrow(dim, rank * size, size).clone()
    for shard in shards:
        shard["rope.freqs"] = torch.ones(4)
    return shards


def write_fairscale_checkpoint(
    folder: Path,
    params: Mapping[str, Any] = TINY_PARAMS,
    mp: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    vocab_size: int = 90,
    embedding_dim: int = 1,
) -> dict[str, Tensor]:
    """Writes `consolidated.NN.pth` and `params.json` of a random Llama into `folder`.

    Args:
        folder: made when it does not exist.
        params: the content of `params.json`.
        mp: number of shards.
        seed: of the weights.
        dtype: of the weights.
        vocab_size: rows of the embedding when `params` has no `vocab_size` or -1.
        embedding_dim: see `cut`.

    Returns:
        The full weights by Meta's names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(dict(params)))
    weights = random_weights(params, seed, dtype, vocab_size)
    for rank, shard in enumerate(cut(weights, mp, embedding_dim)):
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    return weights

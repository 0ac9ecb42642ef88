"""The table of names, shapes and cuts agrees with what Meta published."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tpserve.convert.errors import ConvertError
from tpserve.convert.layout import (
    EMBEDDING,
    FAIRSCALE_DIM,
    embedding_shard_dim,
    global_shape,
    is_dropped,
    parameter_names,
)
from tpserve.model.args import ModelArgs
from tpserve.model.plan import TP_DIM, parameter_kind

# params.json, vocabulary, number of shards, and number of parameters as published
PUBLISHED: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "llama-2-7b": ({"dim": 4096, "n_heads": 32, "n_layers": 32}, 32000, 1, 6_738_415_616),
    "llama-2-13b": ({"dim": 5120, "n_heads": 40, "n_layers": 40}, 32000, 2, 13_015_864_320),
    "llama-2-70b": (
        {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80, "multiple_of": 4096, "ffn_dim_multiplier": 1.3},
        32000,
        8,
        68_976_648_192,
    ),
    "llama-3-8b": (
        {"dim": 4096, "n_heads": 32, "n_kv_heads": 8, "n_layers": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3},
        128256,
        1,
        8_030_261_248,
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models(model: str) -> None:
    params, vocab_size, n_shards, n_parameters = PUBLISHED[model]
    args = ModelArgs.from_params(params, vocab_size=vocab_size)
    shapes = {name: global_shape(name, args) for name in parameter_names(args.n_layers)}
    assert sum(map(math.prod, shapes.values())) == n_parameters
    for name, shape in shapes.items():
        dim = 1 if name == EMBEDDING else FAIRSCALE_DIM[parameter_kind(name)]
        assert dim is None or shape[dim] % n_shards == 0, name


def test_the_table_knows_every_parameter_of_the_model_once() -> None:
    assert {EMBEDDING, *FAIRSCALE_DIM} == set(TP_DIM)
    names = parameter_names(2)
    assert len(names) == len(set(names)) == 3 + 2 * 9
    assert {parameter_kind(name) for name in names} == set(TP_DIM)


@pytest.mark.parametrize(
    ("shape", "dim", "n_shards", "expected"),
    [
        ((32000, 2560), 5120, 2, 1),  # Llama-2 13B
        ((32000, 1024), 8192, 8, 1),  # Llama-2 70B
        ((16032, 8192), 8192, 8, 0),  # Llama-3 70B
        ((32000, 4096), 4096, 1, 1),  # one shard: all the same
    ],
)
def test_layout_of_the_embedding_is_told_by_its_shape(
    shape: tuple[int, ...], dim: int, n_shards: int, expected: int
) -> None:
    assert embedding_shard_dim(shape, dim, n_shards) == expected


@pytest.mark.parametrize("shape", [(), (4096,), (32000, 0), (32000, 3000), (32000, 8192), (2, 2, 2)])
def test_embedding_of_an_impossible_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConvertError, match=r"tok_embeddings\.weight is .* dim 4096 and there are 2 shards"):
        embedding_shard_dim(shape, 4096, 2)


def test_only_rope_frequencies_are_dropped() -> None:
    assert is_dropped("rope.freqs")
    assert is_dropped("layers.31.attention.inner_attention.rope.freqs")
    for name in ("layers.0.rope.freqs", "rope.freqs.x", "xrope.freqs", "ropeXfreqs", "norm.weight"):
        assert not is_dropped(name)

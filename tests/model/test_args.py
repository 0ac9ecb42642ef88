"""ModelArgs against the real params.json files, and against wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.data import shared_data
from tpserve.convert.meta_params import params_of
from tpserve.model.args import ModelArgs, ModelArgsError, ffn_hidden_dim, read_params_json

LLAMA_2_70B = {
    "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
    "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [
        (4096, 256, None, 11008),
        (5120, 256, None, 13824),
        (6656, 256, None, 17920),
        (8192, 256, None, 22016),
        (8192, 4096, 1.3, 28672),
        (4096, 1024, 1.3, 14336),
        (64, 4, None, 172),
    ],
)
def test_feed_forward_widths(dim: int, multiple_of: int, multiplier: float | None, width: int) -> None:
    assert ffn_hidden_dim(dim, multiple_of, multiplier) == width


def test_70b() -> None:
    args = ModelArgs.from_params(LLAMA_2_70B, vocab_size=32000)
    assert (args.head_dim, args.n_kv_heads, args.ffn_hidden_dim, args.vocab_size) == (128, 8, 28672, 32000)
    assert ModelArgs.from_dict(json.loads(json.dumps(args.to_dict()))) == args


@pytest.mark.parametrize("name", ["llama-7b", "llama-13b", "llama-30b", "llama-65b", "llama-2-7b", "llama-2-7b-chat",
                                  "llama-2-13b", "llama-2-70b", "llama-3.1-8b"])  # fmt: skip
def test_real_params_files(name: str) -> None:
    params = read_params_json(shared_data("meta_params") / name / "params.json")
    args = ModelArgs.from_params(params, vocab_size=128256 if "3.1" in name else 32000)
    assert args.head_dim == 128
    assert args.use_scaled_rope == ("3.1" in name)
    assert args.rope_theta == (500000.0 if "3.1" in name else 10000.0)


def test_code_llama_and_llama_3_fields() -> None:
    code = ModelArgs.from_params({"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": None, "rope_theta": 1000000,
                                  "multiple_of": 256, "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5,
                                  "max_batch_size": 32, "vocab_size": 32016})  # fmt: skip
    assert (code.n_kv_heads, code.rope_theta, code.vocab_size, code.ffn_hidden_dim) == (32, 1000000, 32016, 11008)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dim": None}, "dim"),
        ({"dim": 0}, "dim"),
        ({"dim": "4096"}, "dim"),
        ({"n_heads": 63}, "n_heads (63) does not divide dim (8192)"),
        ({"n_kv_heads": 7}, "n_kv_heads (7) does not divide n_heads (64)"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"ffn_dim_multiplier": -1}, "ffn_dim_multiplier"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"vocab_size": 31999}, "31999"),
        ({"n_head": 3}, "did you mean 'n_heads'"),
        ({"n_layers": True}, "n_layers"),
    ],
)
def test_wrong_fields_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelArgsError) as e:
        ModelArgs.from_params(LLAMA_2_70B | change, vocab_size=32000)
    assert named in str(e.value)


@pytest.mark.parametrize("field", ["dim", "n_layers", "n_heads"])
def test_missing_fields_are_named(field: str) -> None:
    params = {k: v for k, v in LLAMA_2_70B.items() if k != field}
    with pytest.raises(ModelArgsError, match=field):
        ModelArgs.from_params(params, vocab_size=32000)


@given(st.dictionaries(st.sampled_from([*LLAMA_2_70B, "x"]), st.none() | st.integers() | st.floats() | st.text()))
def test_any_params_are_read_or_refused(params: dict[str, Any]) -> None:
    try:
        args = ModelArgs.from_params(LLAMA_2_70B | params, vocab_size=32000)
    except ModelArgsError:
        return
    assert args.n_heads % args.n_kv_heads == 0


@pytest.mark.parametrize("text", ["", "[]", "<!DOCTYPE html>", "{", "\xff"])
def test_a_params_file_that_is_no_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ModelArgsError, match=r"params\.json"):
        read_params_json(path)


@pytest.mark.parametrize(
    ("dim", "n_layers", "n_heads", "multiplier", "width", "factor"),
    [(2048, 16, 32, 1.5, 8192, 32.0), (3072, 28, 24, 1.0, 8192, 32.0), (4096, 32, 32, 1.3, 14336, 8.0)],
    ids=["3.2-1B", "3.2-3B", "3.1-8B"],
)
def test_how_far_metas_scaled_rope_scales(
    dim: int, n_layers: int, n_heads: int, multiplier: float, width: int, factor: float
) -> None:
    """Meta's files state `use_scaled_rope` only; the numbers are those of the config.json of the same models."""
    params = {
        "dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": 8, "vocab_size": 128256,
        "ffn_dim_multiplier": multiplier, "multiple_of": 1024 if n_layers == 32 else 256, "norm_eps": 1e-05,
        "rope_theta": 500000.0, "use_scaled_rope": True,
    }  # fmt: skip
    args = ModelArgs.from_params(params)
    assert (args.ffn_hidden_dim, args.rope_scale_factor) == (width, factor)
    assert "rope_scale_factor" not in params_of(args)
    assert ModelArgs.from_params(params_of(args)) == args
    other = ModelArgs.from_params(params | {"rope_scale_factor": 16.0})
    assert params_of(other)["rope_scale_factor"] == other.rope_scale_factor == 16.0

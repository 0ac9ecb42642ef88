"""What `transformers` writes is served directly: the same logits, on one rank, from the files as they are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tpserve.convert.open_any import open_any
from tpserve.convert.probe import model_logits
from tpserve.model.loader import load_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

_SCALED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_SHAPES: dict[str, dict[str, Any]] = {
    "llama-2": {"num_key_value_heads": 4},
    "code-llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "num_key_value_heads": 4},
    "llama-3.1": {"rope_parameters": {**_SCALED, "rope_theta": 5e5}},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("shape", _SHAPES)
def test_logits_are_theirs(tmp_path: Path, shape: str) -> None:
    fields: dict[str, Any] = {
        "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 512, "initializer_range": 0.1,
    }  # fmt: skip
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields | _SHAPES[shape])).eval()
        model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = torch.randint(0, 96, (200,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    loaded = load_model(tmp_path, dtype=torch.float32, max_seq_len=200, source=open_any(tmp_path))
    ours = model_logits(loaded.model, tokens.tolist())
    assert ours.std() > 0.5
    assert (ours - theirs).abs().max() <= 1e-4

"""`transformers` loads the Hugging Face folders that we write, and computes the logits that we compute."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.shards import cut, random_weights
from tpserve.convert.convert import convert
from tpserve.convert.probe import plain_logits
from tpserve.convert.source import open_source

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# Two key/value heads of four, and positions enough for Llama 3.1's scaling to change every kind of wavelength.
_BASE: dict[str, Any] = {
    "dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": 96,
}  # fmt: skip
_SHAPES: dict[str, dict[str, Any]] = {
    "llama-2": {},
    "code-llama": {"rope_theta": 1e6, "n_kv_heads": 4},
    "llama-3.1": {"rope_theta": 5e5, "use_scaled_rope": True, "ffn_dim_multiplier": 1.3,
                  "rope_original_context_tokens": 64},
    "tied": {"rope_theta": 1e5},
}  # fmt: skip


@pytest.mark.parametrize("shape", _SHAPES)
def test_logits_are_ours(tmp_path: Path, shape: str) -> None:
    params = _BASE | _SHAPES[shape]
    weights = random_weights(params)
    if shape == "tied":
        weights["output.weight"] = weights["tok_embeddings.weight"] = weights["tok_embeddings.weight"] / 10
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    for rank, shard in enumerate(cut(weights, 2)):
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    hf = convert(folder, tmp_path / "hf", format="hf", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        model = transformers.LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32)
    assert model.config.tie_word_embeddings is (shape == "tied")
    tokens = torch.randint(0, 96, (100,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    source = open_source(folder)
    ours = plain_logits(source.args, source.tensors, tokens.tolist())
    assert ours.std() > 0.05
    assert (ours - theirs).abs().max() <= 1e-4


def test_the_tokenizer_goes_with_it(tmp_path: Path, tokenizer_model: bytes) -> None:
    from sentencepiece import SentencePieceProcessor

    pytest.importorskip("google.protobuf", reason="transformers reads SentencePiece models by protobuf: not installed")
    weights = random_weights(_BASE)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "params.json").write_text(json.dumps(_BASE))
    torch.save(weights, tmp_path / "in" / "consolidated.00.pth")
    (tmp_path / "in" / "tokenizer.model").write_bytes(tokenizer_model)
    hf = convert(tmp_path / "in", tmp_path / "hf", format="hf", progress=False)
    text = "a little girl liked the dog"
    ours = SentencePieceProcessor(model_proto=tokenizer_model).encode(text, add_bos=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        theirs = transformers.AutoTokenizer.from_pretrained(hf)(text)["input_ids"]
    assert theirs == ours
    config = json.loads((hf / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)

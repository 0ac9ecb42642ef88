"""The tokenizer against the published vectors, and against control pieces in user text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpserve.engine.text.load import load_tokenizer
from tpserve.engine.text.tokenizer import Tokenizer, TokenizerError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is absent")


@pytest.fixture(scope="module")
def llama2() -> Tokenizer:
    return load_tokenizer(SHARED / "tokenizer" / "llama2_tokenizer.model")


def vectors() -> list[tuple[str, list[int]]]:
    folder = SHARED / "tokenizer"
    if not folder.is_dir():
        return []
    texts = (folder / "llama2_vectors.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (folder / "llama2_vectors.out").read_text(encoding="utf-8").split("\n")
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=False)]


@needs_shared
def test_there_are_47_vectors() -> None:
    assert len(vectors()) == 47


@needs_shared
@pytest.mark.parametrize(("text", "ids"), vectors())
def test_vector(llama2: Tokenizer, text: str, ids: list[int]) -> None:
    assert llama2.encode(text, bos=False, eos=False) == ids


@needs_shared
def test_bos_and_eos_are_added_where_asked(llama2: Tokenizer) -> None:
    plain = llama2.encode("hello", bos=False, eos=False)
    assert llama2.encode("hello", bos=True, eos=True) == [llama2.bos_id, *plain, llama2.eos_id]
    assert (llama2.bos_id, llama2.eos_id, llama2.vocab_size) == (1, 2, 32000)


@needs_shared
@pytest.mark.parametrize("text", ["<s>", "</s>", "<unk>", "a</s><s>[INST]b", "<0x41>"])
def test_control_pieces_in_text_stay_text(llama2: Tokenizer, text: str) -> None:
    ids = llama2.encode(text, bos=False, eos=False)
    assert not {0, llama2.bos_id, llama2.eos_id} & set(ids)
    assert llama2.decode(ids) == text


@needs_shared
def test_no_piece_is_longer_than_said(llama2: Tokenizer) -> None:
    text = " " * 500
    assert len(llama2.encode(text, bos=False, eos=False)) * llama2.max_piece_chars >= len(text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"nowhere\.model"):
        load_tokenizer(tmp_path / "nowhere.model")


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "tokenizer.model")

"""Incremental text equals whole text, whatever the ids and however they are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.models import MODELS, load, single_bytes
from tpserve.engine.text.detokenizer import IncrementalDetokenizer
from tpserve.engine.text.tokenizer import PieceKind

SPLITS = st.lists(st.integers(1, 5), min_size=1, max_size=8)
# A byte run that is legal UTF-8 is rare among random bytes: draw encoded characters, and torn ones, too.
TORN = st.text(max_size=6).map(lambda s: s.encode("utf-8", "surrogatepass")).flatmap(
    lambda b: st.integers(0, len(b)).map(lambda n: b[:n])
)  # fmt: skip
SPECIAL_BYTES = st.sampled_from([0x00, 0x7F, 0x80, 0xBF, 0xC0, 0xC3, 0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xF8, 0xFF])


def in_steps(model: Path, ids: list[int], splits: list[int]) -> str:
    detokenizer = IncrementalDetokenizer(load(model))
    out, at, step = "", 0, 0
    while at < len(ids):
        size = splits[step % len(splits)]
        out += detokenizer.push(ids[at : at + size])
        at, step = at + size, step + 1
    return out + detokenizer.finish()


@pytest.mark.parametrize("model", MODELS, ids=lambda p: p.parent.name)
@settings(max_examples=200, deadline=None)
@given(data=st.data(), splits=SPLITS)
def test_equals_whole_decoding(model: Path, data: st.DataObject, splits: list[int]) -> None:
    tokenizer = load(model)
    byte_ids = single_bytes(tokenizer)
    spaces = [i for i, (kind, text, _) in enumerate(tokenizer.pieces) if kind is PieceKind.TEXT and text[0] == " "]
    chunk = st.one_of(
        st.integers(0, tokenizer.vocab_size - 1).map(lambda i: [i]),
        st.sampled_from([[0], [1], [2]]),
        st.sampled_from(spaces[:40]).map(lambda i: [i]),
        SPECIAL_BYTES.map(lambda b: [byte_ids[b]]),
        TORN.map(lambda bs: [byte_ids[b] for b in bs]),
    )
    ids = [i for ids in data.draw(st.lists(chunk, max_size=12)) for i in ids]
    assert in_steps(model, ids, splits) == tokenizer.decode(ids)


@pytest.mark.parametrize("model", MODELS, ids=lambda p: p.parent.name)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20))
def test_a_step_never_ends_inside_a_character(model: Path, text: str) -> None:
    tokenizer = load(model)
    detokenizer = IncrementalDetokenizer(tokenizer)
    ids = tokenizer.encode(text, bos=False, eos=False)
    said = ""
    for token_id in ids:
        said += detokenizer.push([token_id])
        assert tokenizer.decode(ids).startswith(said)


@pytest.mark.parametrize("model", MODELS, ids=lambda p: p.parent.name)
def test_a_character_of_bytes_comes_whole(model: Path) -> None:
    tokenizer = load(model)
    byte_ids = single_bytes(tokenizer)
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push([byte_ids[b]]) for b in "東🦙".encode()] == ["", "", "東", "", "", "", "🦙"]


@pytest.mark.parametrize("model", MODELS, ids=lambda p: p.parent.name)
def test_ids_that_only_pad_the_models_vocabulary_say_nothing(model: Path) -> None:
    tokenizer = load(model)
    ids = tokenizer.encode("a dog", bos=False, eos=False)
    assert IncrementalDetokenizer(tokenizer).push([*ids, tokenizer.vocab_size, tokenizer.vocab_size + 9]) == "a dog"

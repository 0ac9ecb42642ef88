"""Byte-pair tokenizers against tiktoken, and the text of their tokens."""

from __future__ import annotations

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.byte_level import TEXTS, llama3_model
from tests.text.models import load
from tpserve.convert.llama3_ranks import LLAMA3_SPECIAL_TOKENS, LLAMA3_SPLIT, read_ranks
from tpserve.engine.sampling_fields import Vocabulary, sampling_params
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.text.detokenizer import IncrementalDetokenizer
from tpserve.engine.text.tokenizer import PieceKind

PARTS = st.sampled_from(
    ["ab", "a", "b", "  ", " ", "\n", "\t", "12", "'s", "'LL", "é", "日", "🦙", "the", "<|eot_id|>", "="]
)
SOME_TEXT = st.lists(st.one_of(PARTS, st.text(max_size=4)), max_size=25).map("".join)


def reference() -> tiktoken.Encoding:
    path = llama3_model()
    ranks = read_ranks(path, path.read_bytes())
    special = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
    return tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special)


REFERENCE, LLAMA3 = reference(), load(llama3_model())


@pytest.mark.parametrize("text", TEXTS)
def test_llama3_as_tiktoken(text: str) -> None:
    ids = LLAMA3.encode(text, bos=False, eos=False)
    assert ids == REFERENCE.encode(text, disallowed_special=())
    assert LLAMA3.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(SOME_TEXT)
def test_llama3_as_tiktoken_on_any_text(text: str) -> None:
    assert LLAMA3.encode(text, bos=False, eos=False) == REFERENCE.encode(text, disallowed_special=())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, LLAMA3.vocab_size - 257), max_size=12))
def test_any_ids_decode_as_tiktokens(ids: list[int]) -> None:
    assert LLAMA3.decode(ids) == REFERENCE.decode(ids)


def test_llama3s_control_tokens_follow_the_ranks() -> None:
    first = LLAMA3.vocab_size - 256
    assert [LLAMA3.special_id(f"<|{name}|>") for name in ("begin_of_text", "start_header_id", "end_header_id")] == [
        first, first + 6, first + 7,
    ]  # fmt: skip
    assert (LLAMA3.bos_id, LLAMA3.eos_id) == (first, first + 1)
    assert LLAMA3.end_ids == (first + 1, first + 9, first + 8)
    assert LLAMA3.controls[first + 9] == "<|eot_id|>"
    assert len(set(LLAMA3_SPECIAL_TOKENS)) == 256
    assert LLAMA3.encode("a", bos=True, eos=True) == [first, *LLAMA3.encode("a", bos=False, eos=False), first + 1]


@pytest.mark.parametrize("name", [*LLAMA3_SPECIAL_TOKENS[:12], "<s>"])
def test_control_tokens_in_text_stay_text(name: str) -> None:
    for text in (name, f"a{name}{name}b", f" {name} "):
        ids = LLAMA3.encode(text, bos=False, eos=False)
        assert not LLAMA3.controls.keys() & set(ids)
        assert LLAMA3.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, LLAMA3.vocab_size + 3), max_size=14))
def test_steps_are_the_whole_and_never_cut_a_character(ids: list[int]) -> None:
    plain = [i for i in ids if i < LLAMA3.vocab_size - 256]
    detokenizer = IncrementalDetokenizer(LLAMA3)
    steps = [detokenizer.push([i]) for i in ids] + [detokenizer.finish()]
    assert "".join(steps) == REFERENCE.decode(plain)


def test_no_token_is_longer_than_said() -> None:
    assert max(len(p.text) for p in LLAMA3.pieces) == LLAMA3.max_piece_chars
    assert any(len(p.data) > 1 for p in LLAMA3.pieces if p.kind is PieceKind.BYTES), "torn characters are tested"


def test_bad_words_are_spelled_as_at_a_texts_beginning_and_after_a_space() -> None:
    vocabulary = Vocabulary(LLAMA3, LLAMA3.vocab_size)
    for word in ("cat", "\n", "日本", "<|eot_id|>"):
        found = sampling_params({"bad_words": [word]}, SamplingParams(), vocabulary).bad_words
        assert [LLAMA3.decode([*ids]) for ids in found] == [word, " " + word]

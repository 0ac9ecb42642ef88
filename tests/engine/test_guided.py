"""Whatever tokens a mask allows, the decoded text fits the grammar; and whatever fits can be spelled."""

from __future__ import annotations

import copy
import json
import random
import re
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.data import DEMO_CHECKPOINT, shared_data
from tests.helpers.grammars import fits, random_regex, random_schema
from tests.text.byte_level import llama3_model
from tpserve.engine.errors import RequestError
from tpserve.engine.guided import Grammars, Matcher
from tpserve.engine.sampling_params import Guided
from tpserve.engine.text.load import load_tokenizer
from tpserve.engine.text.tokenizer import Tokenizer

PADDING = 37  # rows of the logits beyond the tokenizer's ids
VOCABULARIES = ["demo", "stories260K", "llama2", "llama3"]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name"],
    "additionalProperties": False,
}


class Case:
    """A tokenizer and its grammars."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.size = tokenizer.vocab_size + PADDING
        self.grammars = Grammars(tokenizer, self.size)

    def matcher(self, kind: Any, grammar: Any) -> Matcher:
        return self.grammars.matcher(Guided(kind, grammar if isinstance(grammar, str) else json.dumps(grammar)))

    def allowed(self, matcher: Matcher) -> list[int]:
        words = np.full((self.size + 31) // 32, -1, dtype=np.int32)
        matcher.fill_mask(words)
        return [int(i) for i in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))]

    def walk(self, matcher: Matcher, rng: random.Random, limit: int = 600) -> list[int]:
        """A random answer without its EOS."""
        ids: list[int] = []
        while not matcher.finished:
            assert len(ids) < limit, self.tokenizer.decode(ids)
            allowed = self.allowed(matcher)
            eos = self.tokenizer.eos_id
            token = eos if eos in allowed and rng.random() < 0.3 else rng.choice(allowed)
            assert matcher.advance(token)
            if token not in self.tokenizer.end_ids:
                ids.append(token)
        assert matcher.error is None
        return ids

    def takes(self, matcher: Matcher, text: str) -> bool:
        """The tokenizer's own spelling of a text is an answer."""
        ids = self.tokenizer.encode(text, bos=False, eos=False)
        if self.tokenizer.decode(ids) != text:
            return True  # this tokenizer normalises it: it has no spelling of its own
        return all(matcher.advance(i) for i in ids) and matcher.advance(self.tokenizer.eos_id)


def _load(name: str) -> Case:
    if name == "demo":
        return Case(load_tokenizer(DEMO_CHECKPOINT / "tokenizer.model"))
    if name == "llama3":
        return Case(load_tokenizer(llama3_model()))
    file = {"stories260K": "stories260K/tokenizer.model", "llama2": "tokenizer/llama2_tokenizer.model"}[name]
    return Case(load_tokenizer(Path(shared_data(file))))


@pytest.fixture(scope="module", params=VOCABULARIES)
def case(request: pytest.FixtureRequest) -> Case:
    return _load(request.param)


@pytest.fixture(scope="module")
def demo() -> Case:
    return _load("demo")


def test_json_of_random_schemas(case: Case) -> None:
    for seed in range(200):
        rng = random.Random(seed)
        schema = random_schema(rng)
        text = case.tokenizer.decode(case.walk(case.matcher("json", schema), rng))
        value = json.loads(text)
        assert fits(value, schema), (seed, schema, text)
        for separators in (None, (",", ":")):
            written = json.dumps(value, ensure_ascii=False, separators=separators)
            assert not _plain(written) or case.takes(case.matcher("json", schema), written), (seed, schema, written)


def _plain(written: str) -> bool:
    """The library writes numbers its own way at the ends of float's range; and DEL it wants escaped."""
    return re.search(r"\de|\x7f|\d{16}", written) is None


def test_text_of_random_regexes(case: Case) -> None:
    for seed in range(100):
        rng = random.Random(seed)
        regex, sample = random_regex(rng)
        assert re.fullmatch(regex, sample), "the test's own mistake"
        assert case.takes(case.matcher("regex", regex), sample), (seed, regex, sample)
        matcher, ids = case.matcher("regex", regex), list[int]()
        while len(text := case.tokenizer.decode(ids)) < 30:
            allowed = case.allowed(matcher)
            # Not inside a character; and the library knows a later Unicode than this Python.
            if not any(c == "\ufffd" or unicodedata.category(c) == "Cn" for c in text):
                complete = re.fullmatch(regex, text) is not None
                assert complete == (case.tokenizer.eos_id in allowed), (seed, regex, text)
            ordinary = [i for i in allowed if i not in case.tokenizer.end_ids]
            assert matcher.finished == (not ordinary)
            if not ordinary:
                break
            ids.append(rng.choice(ordinary))
            assert matcher.advance(ids[-1])


@pytest.mark.parametrize(
    "choices",
    [
        ["yes", "no"],
        ["a", "ab", "abc"],
        ["the", " the", "  the"],
        ["", "x"],
        ["日本", "日本語", "🦙", "é\n", "a/b|c", '"\\', "(.*)", "\u2581x"],
        ["\x00\x7f", "<s>", "</s>", "<0x0A>"],
    ],
)
def test_choices(case: Case, choices: list[str]) -> None:
    texts = {
        case.tokenizer.decode(case.walk(case.matcher("choice", choices), random.Random(seed))) for seed in range(150)
    }
    assert texts == set(choices)
    for choice in choices:
        assert case.takes(case.matcher("choice", choices), choice)
    assert not case.takes(case.matcher("choice", choices), "never")


def test_the_first_pieces_space_is_none_of_the_text(demo: Case) -> None:
    pieces = {text: i for i, (_, text, _) in enumerate(demo.tokenizer.pieces) if text}
    the, spaced_the, space = pieces["the"], pieces[" the"], pieces[" "]
    for ids in ([the], [spaced_the], [space, the]):
        matcher = demo.matcher("choice", ["the"])
        assert all(matcher.advance(i) for i in ids)
        assert matcher.finished
        assert demo.tokenizer.decode(ids) == "the"
    assert not demo.matcher("choice", [" the"]).advance(spaced_the)
    matcher = demo.matcher("choice", [" the"])
    assert matcher.advance(space)
    assert not matcher.advance(the)
    assert matcher.advance(spaced_the)
    assert matcher.finished
    assert demo.tokenizer.decode([space, spaced_the]) == " the"


def test_advance_and_mask_agree_on_every_id(demo: Case) -> None:
    matcher, rng = demo.matcher("json", PERSON), random.Random(1)
    for _ in range(6):
        allowed = demo.allowed(matcher)
        taken = [i for i in range(-1, demo.size + 40) if matcher.fork().advance(i)]
        assert taken == allowed
        control = {demo.tokenizer.bos_id, 0, *range(demo.tokenizer.vocab_size, demo.size + 40)}
        assert not control & set(allowed)
        assert matcher.advance(rng.choice(allowed))


def test_a_model_with_fewer_rows_than_the_tokenizer_has_pieces(demo: Case) -> None:
    case = Case(demo.tokenizer)
    case.size = 1001  # no whole number of words
    case.grammars = Grammars(demo.tokenizer, case.size)
    matcher, rng = case.matcher("json", PERSON), random.Random(2)
    while not matcher.finished:
        allowed = case.allowed(matcher)
        assert max(allowed) < case.size
        assert matcher.advance(rng.choice(allowed))


def test_a_refused_token_changes_nothing(demo: Case) -> None:
    matcher = demo.matcher("choice", ["the", "then"])
    before = demo.allowed(matcher)
    assert not matcher.advance(demo.tokenizer.eos_id)
    assert not matcher.advance(demo.tokenizer.bos_id)
    assert demo.allowed(matcher) == before
    assert demo.takes(matcher, "then")


def test_forks_and_rollbacks_are_where_a_fresh_matcher_would_be(case: Case) -> None:
    for seed, (kind, grammar) in enumerate([("json", PERSON), ("regex", " ?(a|é|b c){2,9}"), ("choice", ["a", " ab"])]):
        rng = random.Random(seed)
        matcher, ids = case.matcher(kind, grammar), list[int]()
        for _ in range(60):
            if ids and rng.random() < 0.4:
                back = rng.randint(1, len(ids))
                matcher.rollback(back)
                del ids[-back:]
            elif rng.random() < 0.3:
                abandoned, matcher = matcher, matcher.fork()
                abandoned.advance(rng.choice(case.allowed(abandoned)))
            else:
                ids.append(rng.choice(case.allowed(matcher)))
                assert matcher.advance(ids[-1])
            fresh = case.matcher(kind, grammar)
            assert all(fresh.advance(i) for i in ids)
            assert case.allowed(matcher) == case.allowed(fresh)
            assert matcher.finished == fresh.finished


def test_eos_ends_and_can_be_undone(demo: Case) -> None:
    matcher, eos = demo.matcher("regex", "a*"), demo.tokenizer.eos_id
    before = demo.allowed(matcher)
    assert eos in before
    assert not matcher.finished
    assert matcher.advance(eos)
    assert matcher.finished
    assert demo.allowed(matcher) == [eos]
    matcher.rollback(1)
    assert demo.allowed(matcher) == before


def test_without_an_eos_id_only_finished_ends(demo: Case) -> None:
    tokenizer = copy.copy(demo.tokenizer)
    tokenizer.eos_id, tokenizer.end_ids = -1, ()
    case = Case(tokenizer)
    matcher = case.matcher("choice", ["ab", "abab"])
    pieces = {text: i for i, (_, text, _) in enumerate(tokenizer.pieces) if text}
    for done, piece in ((False, "a"), (False, "b"), (False, "a"), (True, "b")):
        assert matcher.advance(pieces[piece])
        assert matcher.finished == done
    assert case.allowed(matcher) == []


def test_ranks_compute_equal_masks_whatever_they_served_before(demo: Case) -> None:
    other = Case(demo.tokenizer)
    other.walk(other.matcher("json", PERSON), random.Random(5))
    one, two = demo.matcher("json", PERSON), other.matcher("json", PERSON)
    rng = random.Random(6)
    while not one.finished:
        allowed = demo.allowed(one)
        assert allowed == other.allowed(two)
        token = rng.choice(allowed)
        assert one.advance(token)
        assert two.advance(token)


def test_no_schema_is_an_object_and_the_empty_schema_any_value(demo: Case) -> None:
    assert demo.takes(demo.matcher("json", ""), '{"a": [1, null, "x"]}')
    assert not demo.takes(demo.matcher("json", ""), "[1]")
    for anything in ("{}", "true"):
        assert demo.takes(demo.matcher("json", anything), "[1]")


def test_white_space_is_bounded_even_where_the_schema_asks_for_more(demo: Case) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3}
    matcher, ids = demo.matcher("json", schema | {"x-guidance": {"whitespace_pattern": r"\s+"}}), list[int]()
    while not matcher.finished:
        allowed = demo.allowed(matcher)
        spaces = [i for i in allowed if demo.tokenizer.decode([13, i])[-1:].isspace()]
        ids.append(random.Random(len(ids)).choice(spaces or allowed))
        assert matcher.advance(ids[-1])
        assert len(ids) < 500
    text = demo.tokenizer.decode(ids)
    assert len(json.loads(text)) == 3
    assert max(map(len, re.findall(r"\s+", text))) == 17
    assert demo.takes(demo.matcher("json", PERSON), json.dumps({"name": "Eve", "age": 5}, indent=4))


def test_a_grammar_that_becomes_too_complex_ends_with_its_reason(demo: Case) -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}
    matcher = demo.matcher("json", schema)
    pieces = {text: i for i, (_, text, _) in enumerate(demo.tokenizer.pieces) if text}
    byte = next(i for i, piece in enumerate(demo.tokenizer.pieces) if piece.data == b"{")
    assert matcher.advance(pieces.get("{", byte))
    assert matcher.finished
    assert matcher.error is not None
    assert demo.allowed(matcher) == [demo.tokenizer.eos_id]
    matcher.rollback(1)


@pytest.mark.parametrize(
    ("kind", "grammar", "reason"),
    [
        ("json", "{", "Expecting property name"),
        ("json", "[1]", "must be a JSON object"),
        ("json", '{"type": "text"}', "Invalid type: text"),
        ("json", '{"type": "object", "not": {}}', "not"),
        ("json", '{"const": NaN}', "JSON compliant"),
        ("json", '{"type": "integer", "minimum": 3, "maximum": 1}', "minimum"),
        ("json", '{"$ref": "https://example.org/schema"}', "example.org"),
        ("json", '{"$ref": "#"}', "no text"),
        ("json", '{"const": "\\ud800"}', "escape"),
        ("json", '{"type": "integer", "multipleOf": 1000003}', "multipleOf"),
        ("json", '{"type": "number", "multipleOf": 1e-300}', "multipleOf"),
        ("json", '{"items":' * 10_000 + "{}" + "}" * 10_000, "at most"),
        ("json", '{"items":' * 2000 + "{}" + "}" * 2000, "nested deeper"),
        ("json", '{"items":' * 200 + "{}" + "}" * 200, "nested 200 levels deep, 100 are"),
        ("json", '{"const": "' + "a" * 10**6 + '"}', "at most"),
        ("regex", "(a", "unclosed group"),
        ("regex", "(" * 4000 + "a" + ")" * 4000, "invalid regex"),
        ("regex", "a" * 10**6, "at most"),
        ("regex", r"a\b", "lookarounds"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", r"[^\s\S]", "no text"),
        ("regex", "\ud800", "surrogate"),
        (
            "json",
            json.dumps({"allOf": [{"anyOf": [{"const": f"{i}{j}"} for j in range(9)]} for i in range(9)]}),
            "complex",
        ),
        ("choice", "[]", "at least one"),
        ("choice", '["a", 1]', "at least one"),
        ("choice", "yes", "Expecting value"),
        ("choice", '["\\udc00"]', "surrogate"),
    ],
)
def test_broken_grammars_are_refused_with_a_reason(demo: Case, kind: Any, grammar: str, reason: str) -> None:
    started = time.process_time()
    with pytest.raises(RequestError, match=re.escape(reason)) as refused:
        demo.grammars.check(Guided(kind, grammar))
    assert time.process_time() - started < 1
    assert refused.value.field == f"guided_{kind}"
    assert len(str(refused.value)) < 500
    assert "%llguidance" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "grammar"),
    [
        ("regex", "(a*)" * 2000),
        ("regex", "(((a{1000}){1000}){1000}){1000}"),
        ("regex", r"(\w{50}|\p{L}{60}){50}"),
        ("regex", "(.*a.{20}.*b.{20}|.*c.{30}){3}"),
        ("regex", "a?" * 1500 + "a" * 1500),
        ("json", '{"type": "string", "maxLength": 1000000000}'),
        ("json", '{"type": "string", "pattern": "(.*a.{100}){20}"}'),
        ("json", '{"type": "array", "minItems": 1000000}'),
        ("json", json.dumps({"enum": [f"x{i}" for i in range(6000)]})),
        ("choice", json.dumps([str(i) for i in range(8000)])),
    ],
)
def test_bombs_are_refused_or_cost_little(case: Case, kind: Any, grammar: str) -> None:
    started, rng = time.process_time(), random.Random(0)
    try:
        matcher = case.matcher(kind, grammar)
    except RequestError:
        pass
    else:
        for _ in range(30):
            if matcher.finished:
                break
            assert matcher.advance(rng.choice(case.allowed(matcher)))
    assert time.process_time() - started < 1


def test_only_the_last_grammars_are_kept(demo: Case) -> None:
    grammars = Grammars(demo.tokenizer, demo.size, cached=2)
    for regex in ("a", "b", "a", "c"):
        grammars.check(Guided("regex", regex))
    assert [grammar for _, grammar in grammars._compiled] == ["a", "c"]

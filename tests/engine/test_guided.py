"""Whatever tokens a mask allows, the decoded text fits the grammar; and whatever fits can be spelled."""

from __future__ import annotations

import copy
import json
import random
import re
import unicodedata

import pytest

from tests.engine.guided_case import PERSON, VOCABULARIES, Case, load_case
from tests.helpers.grammars import fits, random_regex, random_schema
from tpserve.engine.guided import Grammars


@pytest.fixture(scope="module", params=VOCABULARIES)
def case(request: pytest.FixtureRequest) -> Case:
    return load_case(request.param)


@pytest.fixture(scope="module")
def demo() -> Case:
    return load_case("demo")


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

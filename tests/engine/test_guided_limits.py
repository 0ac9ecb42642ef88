"""Grammars at their limits: broken ones, bombs, white space without end, and how many are kept."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import pytest

from tests.engine.guided_case import PERSON, VOCABULARIES, Case, load_case
from tpserve.engine.errors import RequestError
from tpserve.engine.guided import Grammars
from tpserve.engine.sampling_params import Guided


@pytest.fixture(scope="module", params=VOCABULARIES)
def case(request: pytest.FixtureRequest) -> Case:
    return load_case(request.param)


@pytest.fixture(scope="module")
def demo() -> Case:
    return load_case("demo")


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

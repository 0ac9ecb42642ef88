"""Grammars that explode, looked at where they can do no harm."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.text.models import load, tiny_model
from tpserve.engine.errors import RequestError
from tpserve.engine.grammar_check import GrammarChecker, UnknownGrammarError
from tpserve.engine.sampling_params import Guided

# In 0.12 s at 12 patterns, 6 s at 15; 39 would be 18 GB, for which the library aborts the process.
BOMB = Guided("json", json.dumps({"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(1, 40)]}))


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    one = GrammarChecker(tiny_model(), load(tiny_model()).vocab_size)
    yield one
    one.close()


def test_what_can_be_used_and_what_cannot(checker: GrammarChecker) -> None:
    good, bad = Guided("regex", "[a-c]+"), Guided("regex", "[a-")
    for guided in (good, bad):
        with pytest.raises(UnknownGrammarError):
            checker.recall(guided)
    checker.check(good)
    checker.recall(good)
    for ask in (checker.check, checker.recall):
        with pytest.raises(RequestError, match="invalid regex") as refused:
            ask(bad)
        assert refused.value.field == "guided_regex"


def test_one_that_explodes_costs_its_own_process_only(checker: GrammarChecker) -> None:
    with pytest.raises(RequestError, match="2 s and 512 MiB were not enough"):
        checker.check(BOMB)
    with pytest.raises(RequestError, match="too complex"):
        checker.recall(BOMB)
    checker.check(Guided("choice", '["yes", "no"]'))

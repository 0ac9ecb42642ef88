"""Guided requests through real ranks: what users get fits the grammar, whatever runs beside it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.grammars import fits, random_regex, random_schema
from tests.helpers.groups import rank_group, with_
from tests.helpers.local import LocalEngine
from tests.helpers.requests import Collected
from tests.helpers.stories import EOS, VOCAB_SIZE, converted, prompts, tokenizer
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.guided import Grammars
from tpserve.engine.sampling_params import Guided

MAX_SEQ_LEN = 256
LENGTH = 180
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 0, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def guided(kind: Any, grammar: Any) -> Guided:
    return Guided(kind, grammar if isinstance(grammar, str) else json.dumps(grammar))


def text(stream: Collected, index: int = 0) -> str:
    return tokenizer().decode(stream.answers[index])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return EngineConfig(
        checkpoint_dir=str(converted(tmp_path_factory.mktemp("guided"))),
        device="cpu",
        max_seq_len=MAX_SEQ_LEN,
        max_num_seqs=64,
        max_num_batched_tokens=192,
        checksum_interval=4,
    )


@pytest.fixture(scope="module", params=[1, 2])
def client(request: pytest.FixtureRequest, config: EngineConfig) -> Iterator[EngineClient]:
    with rank_group(config, request.param) as client:
        yield client


def neighbours(engine: Any) -> list[Collected]:
    """Streams without a grammar."""
    return [Collected(engine, p, max_new_tokens=70, ignore_eos=True, temperature=i % 2, seed=i)
            for i, p in enumerate(prompts(4, seed=14))]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(config: EngineConfig) -> list[list[int]]:
    """What the neighbours say when nobody is guided."""
    engine = LocalEngine(config)
    streams = neighbours(engine)
    engine.run()
    return [stream.ids for stream in streams]


def how(i: int) -> dict[str, Any]:
    return {"temperature": i % 2, "seed": i, "max_new_tokens": LENGTH}


def test_json_of_a_hundred_random_schemas_side_by_side(client: EngineClient, undisturbed: list[list[int]]) -> None:
    size = client.config.tensor_parallel_size
    seeds = range(size - 1, 200, 2)  # the other TP has the other hundred
    schemas = [random_schema(random.Random(seed)) for seed in seeds]
    others = neighbours(client)
    some = prompts(len(schemas), seed=15, longest=40)
    # Without it this network writes numbers without end.
    ending = {i: 8.0 for i in range(VOCAB_SIZE) if set(tokenizer().decode([i])) & set(",}]")} | {EOS: 25.0}
    streams = [Collected(client, p, guided=guided("json", schema), logit_bias=ending if i % 5 else {}, **how(i // 3))
               for i, (p, schema) in enumerate(zip(some, schemas, strict=True))]  # fmt: skip
    complete = 0
    grammars = Grammars(tokenizer(), VOCAB_SIZE)
    for schema, stream in zip(schemas, streams, strict=True):
        stream.wait()
        assert stream.error is None
        if stream.finish_reason == "stop":
            complete += 1
            assert fits(json.loads(text(stream)), schema), (schema, text(stream))
        else:
            assert stream.finish_reason == "length"
            assert len(stream.ids) == LENGTH
            matcher = grammars.matcher(guided("json", schema))
            assert all(map(matcher.advance, stream.ids)), "it is not even the beginning of a value"
    assert [stream.wait() for stream in others] == undisturbed
    print(f"\nTP {size}: {complete} of {len(schemas)} values are complete, "  # noqa: T201
          f"{sum(len(stream.ids) for stream in streams)} tokens")  # fmt: skip
    assert complete >= 90


def test_regexes_and_choices(client: EngineClient) -> None:
    rng = random.Random(16)
    regexes = [random_regex(rng)[0] for _ in range(15)]
    lists = [["yes", "no"], ["a", "ab", "abc"], [" leading", "two words"], ["日本語🦙", "é"], ["one"]]
    written = [
        Collected(client, [1, 5 + i], guided=guided("regex", regex), **how(i)) for i, regex in enumerate(regexes)
    ]
    chosen = [Collected(client, [1, 5 + i], guided=guided("choice", one), **how(i)) for i, one in enumerate(lists * 4)]
    for regex, stream in zip(regexes, written, strict=True):
        stream.wait()
        assert stream.finish_reason in ("stop", "length")
        if stream.finish_reason == "stop":
            assert re.fullmatch(regex, text(stream)), (regex, text(stream))
    assert sum(stream.finish_reason == "stop" for stream in written) >= 12
    for one, stream in zip(lists * 4, chosen, strict=True):
        stream.wait()
        assert stream.finish_reason == "stop"
        assert text(stream) in one
    assert len({text(stream) for stream in chosen}) > len(lists)


def test_several_answers_and_their_log_probabilities(client: EngineClient) -> None:
    stream = Collected(client, [1, 5], guided=guided("json", PERSON), n=3, temperature=1, seed=1, logprobs=0,
                       max_new_tokens=LENGTH)  # fmt: skip
    stream.wait()
    assert set(stream.finish_reasons.values()) == {"stop"}
    assert all(fits(json.loads(text(stream, i)), PERSON) for i in range(3))
    assert len({text(stream, i) for i in range(3)}) > 1
    assert len(stream.logprobs) == len(stream.ids)


def test_a_request_at_odds_with_its_own_grammar_ends_alone(client: EngineClient, undisturbed: list[list[int]]) -> None:
    others = neighbours(client)
    braces = tuple((i,) for i in range(VOCAB_SIZE) if "{" in tokenizer().decode([i]) or i == 3 + ord("{"))
    at_odds = [
        Collected(client, [1], guided=guided("json", PERSON), bad_words=braces, **how(0)),
        Collected(client, [1], guided=guided("json", PERSON), bad_words=braces, **how(1)),
        Collected(client, [1], guided=guided("choice", [""]), min_tokens=3, **how(0)),
    ]  # fmt: skip
    fine = Collected(client, [1], guided=guided("json", PERSON), **how(0))
    for stream in at_odds:
        stream.wait()
        assert stream.finish_reason == "error"
        assert stream.error is not None
        assert "forbid" in stream.error
    fine.wait()
    assert fits(json.loads(text(fine)), PERSON)
    assert [stream.wait() for stream in others] == undisturbed


def test_beams_within_a_grammar(client: EngineClient) -> None:
    stream = Collected(client, prompts(1)[0], guided=guided("json", PERSON), beam_width=3, n=3, max_new_tokens=LENGTH)
    stream.wait()
    found = [json.loads(text(stream, i)) for i in range(3)]
    assert all(fits(value, PERSON) for value in found)
    assert set(stream.finish_reasons.values()) == {"stop"}


def requests() -> list[tuple[list[int], dict[str, Any]]]:
    schemas = [random_schema(random.Random(seed)) for seed in range(300, 316)]
    found = [(p, how(i) | {"guided": guided("json", schemas[i])}) for i, p in enumerate(prompts(16, seed=17))]
    repeat = guided(
        "json", {"type": "array", "items": {"enum": ["again and again", "once more"]}, "minItems": 6, "maxItems": 8}
    )
    return found + [([1, 5], how(i) | {"guided": repeat}) for i in range(4)]  # fmt: skip


def all_answers(engine: LocalEngine) -> list[tuple[list[int], str | None]]:
    streams = [Collected(engine, p, **more) for p, more in requests()]  # type: ignore[arg-type]
    engine.run()
    return [(stream.ids, stream.finish_reason) for stream in streams]


@pytest.fixture(scope="module")
def unchanged(config: EngineConfig) -> list[tuple[list[int], str | None]]:
    return all_answers(LocalEngine(config))


@pytest.mark.parametrize("changes", [
    {"num_kv_blocks": 32, "block_size": 8},
    {"num_speculative_tokens": 4},
    {"num_speculative_tokens": 4, "num_kv_blocks": 32, "block_size": 8, "async_scheduling": False},
    {"async_scheduling": False, "max_num_batched_tokens": 64, "enable_prefix_caching": False},
])  # fmt: skip
def test_the_same_answers_in_every_situation(
    config: EngineConfig, unchanged: list[tuple[list[int], str | None]], changes: dict[str, Any]
) -> None:
    engine = LocalEngine(with_(config, **changes))
    assert all_answers(engine) == unchanged
    scheduler = engine.core.scheduler
    assert (scheduler.residency.num_preemptions > 0) == ("num_kv_blocks" in changes)
    assert (scheduler.num_accepted_tokens > 0) == ("num_speculative_tokens" in changes)


def test_the_end_token_is_allowed_only_where_the_answer_may_end(client: EngineClient) -> None:
    # However much the network wants to end.
    stream = Collected(client, [1], guided=guided("json", PERSON), logit_bias={EOS: 100.0}, **how(1))
    stream.wait()
    assert stream.finish_reason == "stop"
    assert fits(json.loads(text(stream)), PERSON)

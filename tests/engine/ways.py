"""Every way of choosing tokens, and whether two engines said the same."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.local import LocalEngine
from tests.helpers.requests import Collected
from tests.helpers.stories import EOS

SAMPLED = {"temperature": 0.8, "seed": 3}
# Makes any model repeat itself: few tokens are left.
PARROT = {"logit_bias": dict.fromkeys((261, 265, 426), 30.0)}

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "filters": SAMPLED | {"top_p": 0.9, "top_k": 30, "min_p": 0.02},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": -0.4},
    "penalties, sampled": SAMPLED | {"repetition_penalty": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "bad words": {"bad_words": ((432,), (267, 265), (426, 261), (265, 265, 265), (261, 426, 265))},
    "bad words, sampled": SAMPLED | PARROT | {"bad_words": ((261, 265), (265, 261, 261))},
    "logit_bias": PARROT,
    "logit_bias, sampled": SAMPLED | PARROT,
    "stop tokens": {"stop_token_ids": (426,)},
    "stop tokens, sampled": SAMPLED | PARROT | {"logit_bias": PARROT["logit_bias"] | {EOS: 45.0}},
    "min_tokens": {"stop_token_ids": (426, 432, 267), "min_tokens": 13},
    "min_tokens, sampled": SAMPLED | {"stop_token_ids": tuple(range(400, 440)), "min_tokens": 7},
    "log-probabilities": {"logprobs": 3, "prompt_logprobs": 1},
    "log-probabilities, sampled": SAMPLED | PARROT | {"logprobs": 0},
    "decaying top_p": SAMPLED | {"top_p": 0.95, "top_p_decay": 0.8, "top_p_min": 0.2, "top_p_reset_ids": (426, 265)},
    "answers": SAMPLED | PARROT | {"n": 2, "logprobs": 1},
}


def answers(engine: Any, some: list[list[int]], how: dict[str, Any]) -> list[Collected]:
    streams = [Collected(engine, p, **({"max_new_tokens": 30 + 3 * i} | how)) for i, p in enumerate(some)]
    if isinstance(engine, LocalEngine):
        engine.run()
    for stream in streams:
        stream.wait()
    return streams


def assert_same(one: Collected, other: Collected) -> None:
    assert one.answers == other.answers
    assert one.finish_reasons == other.finish_reasons
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert len(one.top_logprobs) == len(other.top_logprobs)
    for mine, others in zip(one.top_logprobs, other.top_logprobs, strict=True):
        assert [value for _, value in mine] == pytest.approx([value for _, value in others], abs=1e-4)
        assert dict(mine) == pytest.approx(dict(others), abs=1e-4)
    assert (one.prompt_logprobs is None) == (other.prompt_logprobs is None)

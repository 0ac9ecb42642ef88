"""Answers as JSON objects: what the predictions API replies and what offline batches write."""

from __future__ import annotations

from typing import Any

from tpserve.engine.answer import Delta
from tpserve.engine.completion import Completion


def whole(completion: Completion) -> dict[str, Any]:
    """All that a finished request says; to be asked once."""
    many = completion.params.n > 1
    answers = [said(delta, many) for delta in completion.take()]
    return ({"choices": answers} if many else answers[0]) | said_of_prompt(completion) | usage(completion)


def said(delta: Delta, many: bool = False) -> dict[str, Any]:
    """What one answer said, as users see it.

    Args:
        delta: of the answer, since it was asked last.
        many: there are several answers, so that each has its index.
    """
    out: dict[str, Any] = {"index": delta.index} if many else {}
    out |= {"text": delta.text, "ids": delta.ids}
    if delta.logprobs is not None:
        out["logprobs"] = delta.logprobs
    if delta.top_logprobs is not None:
        out["top_logprobs"] = delta.top_logprobs
    if delta.finish_reason is not None:
        out["finish_reason"] = delta.finish_reason
    if delta.cumulative_logprob is not None:
        out["cumulative_logprob"] = delta.cumulative_logprob
    return out


def said_of_prompt(completion: Completion) -> dict[str, Any]:
    """Log-probabilities of the prompt's tokens, if there are any; the first token has none."""
    logprobs = completion.prompt_logprobs
    if logprobs is None:
        return {}
    out: dict[str, Any] = {"prompt_logprobs": [one and one.logprob for one in logprobs]}
    if completion.params.prompt_logprobs:
        out["prompt_top_logprobs"] = [one and one.top for one in logprobs]
    return out


def usage(completion: Completion) -> dict[str, Any]:
    """The tokens of a request, to be shown at its end."""
    tokens = completion.usage
    return {
        "usage": {
            "prompt_tokens": tokens.prompt_tokens,
            "completion_tokens": tokens.completion_tokens,
            "total_tokens": tokens.total_tokens,
        }
    }

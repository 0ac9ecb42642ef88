"""The fields that both completions APIs share; `RequestReader.params` knows what they mean.

Ranges here are the reader's own, so that the OpenAPI document says them; what needs the model is only checked there.
"""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from pydantic import Field

from tpserve.engine.limits import MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP, MAX_STOP_CHARS, MAX_STOP_TOKEN_IDS


class Schema(pydantic.BaseModel):
    """A JSON object. A null is as if the field were not there, and unknown fields are passed over."""

    model_config = pydantic.ConfigDict(
        strict=True, extra="ignore", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class Sampling(Schema):
    """How tokens are chosen. All but OpenAI's own are extensions, with vLLM's meaning."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """0: greedy. Default 1, as OpenAI's; 0 with beam search."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Default 1."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """Answers to each prompt."""
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    """So many are generated, and the `n` most probable a token are the answers, told at the end."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    """The same seed, request and model give the same answer; a negative one counts modulo 2**64."""
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP)] | None = None
    """Strings that end the text before them."""
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    """Token id: what is added to its logit."""
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """0 or -1: off."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factual-nucleus sampling: `top_p` is multiplied by it after each token."""
    top_p_min: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p_reset_ids: TokenId | Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    """After one of these tokens `top_p` is what it was at first."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Nothing ends the answer before so many tokens."""
    ignore_eos: bool | None = None
    stop_token_ids: TokenId | Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    bad_words: Annotated[list[str | list[TokenId]], Field(max_length=MAX_BAD_WORDS)] | None = None
    """Strings or lists of token ids that are never completed."""
    beam_width: Annotated[int, Field(ge=1, le=64)] | None = None
    """Above 1: beam search; the `n` best hypotheses are the answers, told at the end."""
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    early_stopping: bool | None = None
    guided_json: dict[str, Any] | str | None = None
    """A JSON schema that the answer obeys."""
    guided_regex: str | None = None
    guided_choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    """The answer is one of these strings."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | bool | None = None
    """Log-probabilities of the prompt's tokens, and of so many most probable ones; not with `stream`."""
    cum_log_probs: bool | None = None
    """Each answer's sum of log-probabilities, as `cumulative_logprob`."""


class StreamOptions(Schema):
    """Options of a stream."""

    include_usage: bool | None = None
    """A chunk without choices and with the usage comes before the end."""


class Request(Sampling):
    """What both completions APIs take beside how tokens are chosen."""

    model: str | None = None
    """The served model's name; another one's is a 404."""
    stream: bool | None = None
    """Whether the answer comes as server-sent events, `data: [DONE]` at the end."""
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Passed over."""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    """Lower ones go first (default 0)."""
    timeout_s: Annotated[float, Field(gt=0)] | None = None
    """From now to the end, waiting included; the `finish_reason` is then "timeout"."""

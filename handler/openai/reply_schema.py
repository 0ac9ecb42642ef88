"""What replies look like. They are written as plain objects, a token at a time; these say their shape, and tests hold
them to it."""

from __future__ import annotations

from typing import Literal

import pydantic

FinishReason = Literal["stop", "length", "tool_calls", "timeout"]


class ReplySchema(pydantic.BaseModel):
    """A JSON object of ours: with these fields and no others."""

    model_config = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorDetail(ReplySchema):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field at fault."""
    code: str | None


class ErrorReply(ReplySchema):
    """Any reply whose status is not 200; also an event of a stream that cannot go on."""

    error: ErrorDetail


class PromptTokensDetails(ReplySchema):
    """Of the prompt's tokens."""

    cached_tokens: int
    """In the prefix cache."""


class Usage(ReplySchema):
    """Tokens of the whole request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(ReplySchema):
    """Of one token at one place."""

    logprob: float
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class TopLogprob(ReplySchema):
    """A token that might have been chosen."""

    token: str
    logprob: float
    bytes: list[int] | None
    """Of the token's text; null for control tokens."""


class TokenLogprob(TopLogprob):
    """A token that was chosen."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ReplySchema):
    """Of a message's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(ReplySchema):
    """A function and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(ReplySchema):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ToolCallDelta(ToolCall):
    """A call in a stream; it comes whole."""

    index: int


class AnswerMessage(ReplySchema):
    """An answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(ReplySchema):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    cumulative_logprob: float | None = None


class ChatCompletion(ReplySchema):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: None = None
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class Delta(ReplySchema):
    """What is new of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(ReplySchema):
    """News of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    cumulative_logprob: float | None = None


class ChatChunk(ReplySchema):
    """An event of a chat completion's stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: None = None
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(ReplySchema):
    """One entry a token; the prompt's first has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Where in the choice's text each token begins."""


class CompletionChoice(ReplySchema):
    """One answer, or in a stream news of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    cumulative_logprob: float | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(ReplySchema):
    """A text completion, or an event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: None = None
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(ReplySchema):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(ReplySchema):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Tokens(ReplySchema):
    """An encoded text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(ReplySchema):
    """A decoded text."""

    prompt: str


class Version(ReplySchema):
    """Of this server."""

    version: str

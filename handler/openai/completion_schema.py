"""What a text completion, a tokenization and its inverse may be asked for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from tpserve.engine.limits import MAX_MESSAGES, MAX_PROMPTS
from tpserve.handler.openai.chat_schema import Message
from tpserve.handler.openai.sampling_schema import Request, Schema

_ID = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_IDS = {"type": "array", "items": _ID, "minItems": 1}
# Read by hand: a union's every branch would look at each of a hundred thousand ids, and name them all.
Prompts = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
            ],
        }
    ),
]
TokenIds = Annotated[Any, WithJsonSchema({"type": "array", "items": _ID})]


class CompletionRequest(Request):
    """A text completion. The text continues the prompt's, a space between them included, unless it is guided."""

    prompt: Prompts
    """Text, token ids, or a list of either; choice `i * n + j` is the answer `j` to prompt `i`."""
    max_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Default 16. 0: nothing is answered, which with `echo` and `logprobs` scores the prompt."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Each token's log-probability, and those of so many most probable ones."""
    echo: bool | None = None
    """The prompt stands before the answer."""
    suffix: None = None
    """Not served: must be null."""


class TokenizeRequest(Schema):
    """What to count or to encode: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    """Whether a prompt gets its beginning-of-sequence token (default true); messages have their template's."""
    return_token_strs: bool | None = None


class DetokenizeRequest(Schema):
    """Token ids to decode."""

    model: str | None = None
    tokens: TokenIds

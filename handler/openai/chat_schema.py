"""What a chat completion may be asked for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tpserve.engine.limits import MAX_MESSAGES, MAX_TOOLS
from tpserve.handler.openai.sampling_schema import Request, Schema

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class TextPart(Schema):
    """A part of a message's content; only text can be read."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]


class SystemMessage(Schema):
    """What the model is to be like."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Schema):
    """What the user said."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Schema):
    """A function and the arguments it was called with, as JSON."""

    name: str
    arguments: str


class CalledTool(Schema):
    """A call that an earlier answer made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Schema):
    """What the model answered."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[CalledTool], Field(max_length=MAX_TOOLS)] | None = None


class ToolMessage(Schema):
    """What a tool returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Schema):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object."""


class Tool(Schema):
    """Something that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Schema):
    """Which function."""

    name: str


class NamedTool(Schema):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Schema):
    """A schema and what it is called."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    """Answers always obey the schema."""


class ResponseFormat(Schema):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Request):
    """A chat completion. Without `max_completion_tokens` an answer may fill the context."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    """The older name of `max_completion_tokens`; not both."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """Default "auto" if there are tools. "required" and a named tool force a call; with "auto" an answer that is
    exactly a call, or a list of them, becomes one."""
    parallel_tool_calls: bool | None = None
    """false: an answer is one call at most."""

"""A chat's messages as protocols bring them, checked: what a template may rely on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from tpserve.engine import fields
from tpserve.engine.errors import RequestError
from tpserve.engine.limits import MAX_MESSAGES, at_most

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call that the assistant made.

    Attributes:
        arguments: a JSON object if it is one, else as it was written.
    """

    name: str
    arguments: Any
    id: str | None = None

    @property
    def text(self) -> str:
        """As Llama 3.1 writes it."""
        return json.dumps({"name": self.name, "parameters": self.arguments}, ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: "system" (which "developer" means, too), "user", "assistant" or "tool".
        content: text; empty if there is none.
        where: in the request, for messages about it.
    """

    role: str
    content: str
    where: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The content with its tool calls, for templates that know none."""
        return "\n".join(filter(None, [self.content, *(call.text for call in self.tool_calls)]))


def read_messages(messages: Any, field: str) -> list[Message]:
    """Checks messages one by one; which order they may have is the template's affair.

    Raises:
        RequestError: names the field, and the message by its index.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"{field} must be a non-empty list of messages, got {fields.shown(messages)}", field=field)
    at_most(field, len(messages), MAX_MESSAGES, "messages")
    try:
        return [_message(message, f"{field}[{i}]") for i, message in enumerate(messages)]
    except RequestError as e:
        raise RequestError(str(e), field=field) from None


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content, got {fields.shown(message)}")
    given = {key: value for key, value in message.items() if value is not None and value != []}
    for key in given:
        if key not in _KEYS:
            raise RequestError(f"{where} has an unknown key {fields.shown(key)}; known: {', '.join(_KEYS)}")
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}, got {fields.shown(role)}")
    calls = _tool_calls(given.get("tool_calls", []), f"{where}.tool_calls")
    if calls and role != "assistant":
        raise RequestError(f"{where}.tool_calls belong to the assistant, not to role {role!r}")
    if "content" not in given and not calls:
        raise RequestError(f"{where} has no content")
    return Message(
        ROLES[role],
        _content(given.get("content", ""), f"{where}.content"),
        where,
        _optional(given, "name", where),
        calls,
        _optional(given, "tool_call_id", where),
    )


def _content(content: Any, where: str) -> str:
    """Text, or OpenAI's list of text parts, whose texts become lines."""
    if not isinstance(content, list):
        return fields.string(where, content)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or set(part) != {"type", "text"}:
            raise RequestError(
                f"{where}[{i}] must be a text part, got {fields.shown(part)}: this model reads only text"
            )
        texts.append(fields.string(f"{where}[{i}].text", part["text"]))
    return "\n".join(texts)


def _tool_calls(calls: Any, where: str) -> tuple[ToolCall, ...]:
    if not isinstance(calls, list):
        raise RequestError(f"{where} must be a list, got {fields.shown(calls)}")
    return tuple(_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls))


def _tool_call(call: Any, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise RequestError(f"{where} must be an object with a function, got {fields.shown(call)}")
    written = fields.string(f"{where}.function.arguments", function.get("arguments", "{}"))
    try:
        arguments = json.loads(written)
    except (ValueError, RecursionError):
        arguments = None
    # Spelt anew: escapes may hide half a surrogate pair, which no text can hold.
    if not isinstance(arguments, dict) or not _is_text(arguments):
        arguments = written
    return ToolCall(
        fields.string(f"{where}.function.name", function.get("name")), arguments, _optional(call, "id", where)
    )


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def _optional(given: Mapping[Any, Any], key: str, where: str) -> str | None:
    value = given.get(key)
    return None if value is None else fields.string(f"{where}.{key}", value)

"""From messages to token ids: the one place that knows the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tpserve.engine.errors import RequestError
from tpserve.handler.openai.chat_schema import Content, Message

if TYPE_CHECKING:
    from tpserve.handler.backend import Backend


def encode_messages(backend: Backend, messages: Sequence[Message], system: str | None = None) -> list[int]:
    """Token ids of a chat, up to where the assistant goes on.

    Args:
        backend: whose template it is.
        messages: checked.
        system: what the system prompt says beside the request's own.

    Raises:
        RequestError: with field "messages".
    """
    plain = [_plain(message) for message in messages]
    if system is not None:
        if plain[0]["role"] == "system":
            system = f"{plain.pop(0)['content']}\n\n{system}"
        plain.insert(0, {"role": "system", "content": system})
    if backend.chat_template is None:
        raise RequestError("this model has no tokenizer, and so no chats", field="messages")
    return backend.chat_template.encode(plain)


def _plain(message: Message) -> dict[str, Any]:
    """What templates know of a message."""
    plain = message.model_dump(exclude_none=True)
    plain["role"] = "system" if message.role == "developer" else message.role
    plain["content"] = _text(message.content)
    return plain


def _text(content: Content | None) -> str:
    """One text; parts are lines, as in vLLM."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)

"""From a chat's messages to token ids, in the way that the model was trained for. A request never brings a template.

Users must not be able to write control tokens, nor the system's or the assistant's lines. Control tokens are put in by
their ids, and what users write is only ever encoded as text. Where a model's marks are plain text themselves, as
Llama-2's are, contents that hold them are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tpserve.engine.errors import ConfigError, RequestError
from tpserve.engine.limits import too_long
from tpserve.engine.text.chat import LLAMA3_TOKENS, SPECIAL_TAGS, encode_llama2, encode_llama3, has_llama3_tokens
from tpserve.engine.text.chat_messages import Message, read_messages
from tpserve.engine.text.jinja_template import JinjaTemplate
from tpserve.engine.text.tokenizer import TextEncoder, Tokenizer

LLAMA2, LLAMA3, CHECKPOINT = "llama2", "llama3", "checkpoint"
_TOOL_PREFIX = "Tool result:\n"


class Encode(Protocol):
    """From checked messages to token ids; `field` is for refusals, `max_chars` bounds what is made on the way."""

    def __call__(self, messages: Sequence[Message], field: str, max_chars: int) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template.

    Attributes:
        name: "llama2", "llama3", "checkpoint" (its own), or the file's name.
        encoder: the template itself.
        max_piece_chars: no token is made from more characters.
        max_seq_len: tokens that the context holds; None: not known.
    """

    name: str
    encoder: Encode
    max_piece_chars: int
    max_seq_len: int | None = None

    @classmethod
    def load(cls, setting: str | Path, tokenizer: TextEncoder) -> ChatTemplate:
        """The template that a configuration asks for.

        Args:
            setting: "llama2", "llama3", or a file.
            tokenizer: of the model.

        Raises:
            ConfigError: the tokenizer cannot serve it, or the file is no template.
        """
        if isinstance(setting, Path):
            return cls(setting.name, JinjaTemplate.from_file(setting, tokenizer), tokenizer.max_piece_chars)
        encoder: Encode = _Llama3(tokenizer) if setting == LLAMA3 else _Llama2(tokenizer)
        return cls(setting, encoder, tokenizer.max_piece_chars)

    def within(self, max_seq_len: int) -> ChatTemplate:
        """The same, for a context of so many tokens."""
        return dataclasses.replace(self, max_seq_len=max_seq_len)

    def encode(self, messages: list[dict[str, Any]], field: str = "messages") -> list[int]:
        """Token ids of a chat, up to where the assistant is to go on.

        Args:
            messages: `role` (system, developer, user, assistant or tool) and `content` (text, or a list of text
                parts); an assistant's may have `tool_calls`, and every one a `name` or a `tool_call_id`.
            field: where they stood, for refusals.

        Raises:
            RequestError: the template cannot take them, or they leave no place for an answer.
        """
        checked = read_messages(messages, field)
        max_seq_len = 2**31 if self.max_seq_len is None else self.max_seq_len
        # Encoding megabytes takes seconds, during which every other stream would stand still.
        at_least = sum(len(message.text.strip()) for message in checked) // self.max_piece_chars
        if at_least >= max_seq_len:
            raise too_long(field, f"at least {at_least}", max_seq_len)
        ids = self.encoder(checked, field, max_seq_len * self.max_piece_chars)
        if len(ids) >= max_seq_len:
            raise too_long(field, str(len(ids)), max_seq_len)
        return ids


class _Llama2:
    """`[INST]`: see `encode_llama2`. Neighbours of one role become one turn; a tool's result is the user's."""

    def __init__(self, tokenizer: TextEncoder) -> None:
        self._tokenizer = tokenizer

    def __call__(self, messages: Sequence[Message], field: str, max_chars: int) -> list[int]:
        turns: list[tuple[str, str]] = []
        for message in messages:
            role, text = message.role, message.text
            if role == "tool":
                role, text = "user", _TOOL_PREFIX + text
            for tag in SPECIAL_TAGS:
                if tag in text:
                    raise RequestError(f"{message.where} holds the special tag {tag!r}, which is not allowed", field)
            if turns and turns[-1][0] == role:
                turns[-1] = role, f"{turns[-1][1]}\n\n{text}"
                continue
            expected = "user" if not turns or turns[-1][0] != "user" else "assistant"
            if role != expected and (turns or role != "system"):
                raise RequestError(
                    f"{message.where} has role {message.role!r}: in Llama-2's template a system message stands first, "
                    f"then users (or tools) and assistants take turns",
                    field,
                )
            turns.append((role, text))
        if turns[-1][0] != "user":
            raise RequestError(f"{messages[-1].where}, the last message, must be a user's or a tool's", field)
        return encode_llama2(self._tokenizer, turns)


class _Llama3:
    """Headers: see `encode_llama3`; a tool is `ipython` there, as in Llama 3.1."""

    def __init__(self, tokenizer: TextEncoder) -> None:
        self._tokenizer = tokenizer
        for name in LLAMA3_TOKENS:
            if tokenizer.special_id(name) is None:
                raise ConfigError(f"chat_template: llama3 needs the token {name}, which this model's tokenizer lacks")

    def __call__(self, messages: Sequence[Message], field: str, max_chars: int) -> list[int]:
        roles = ["ipython" if message.role == "tool" else message.role for message in messages]
        turns = zip(roles, [message.text for message in messages], strict=True)
        return encode_llama3(self._tokenizer, list(turns))


def default_template(tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """What a model has whose operator said nothing: its checkpoint's own, else the one its control tokens are for.

    Raises:
        ConfigError: the checkpoint's is no template that can be served.
    """
    if tokenizer is None:
        return None
    if tokenizer.chat_template is None:
        return ChatTemplate.load(LLAMA3 if has_llama3_tokens(tokenizer) else LLAMA2, tokenizer)
    try:
        encoder = JinjaTemplate(tokenizer.chat_template, tokenizer)
    except ConfigError as e:
        raise ConfigError(f"the checkpoint's own chat template: {e}; name another: handler: chat_template") from None
    return ChatTemplate(CHECKPOINT, encoder, tokenizer.max_piece_chars)

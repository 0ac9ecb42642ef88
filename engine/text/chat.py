"""Meta's chat templates.

Llama-2's: `[INST] … [/INST]`, the system prompt folded into the first user turn; token for token as `chat_completion`
of meta-llama/llama: BOS and EOS around every finished turn, BOS before the last. Llama-3's: a header a message, as
`ChatFormat` of meta-llama/llama3 writes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpserve.engine.errors import RequestError
from tpserve.engine.text.tokenizer import TextEncoder

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>", "<</SYS>>"
SPECIAL_TAGS = (B_INST, E_INST, B_SYS, E_SYS)
ROLES = ("system", "user", "assistant")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def check_dialog(dialog: object, field: str = "dialog") -> list[tuple[str, str]]:
    """Checks a dialog's shape: (role, content) a message.

    Raises:
        RequestError: names the message by its index. Tags of the template inside a content are refused: with them a
            user could write the system's or the assistant's lines.
    """
    if not isinstance(dialog, list) or not dialog:
        raise RequestError(f"{field} must be a non-empty list of messages, got {_kind(dialog)}", field=field)
    messages = [_check_message(message, f"{field}[{i}]", field) for i, message in enumerate(dialog)]
    first_user = 1 if messages[0][0] == "system" else 0
    for i, (role, _) in enumerate(messages[first_user:]):
        expected = "user" if i % 2 == 0 else "assistant"
        if role != expected:
            raise RequestError(
                f"{field}[{first_user + i}] must have role {expected!r}, got {role!r}: a dialog is an optional "
                f"'system' message, then 'user' and 'assistant' in turn",
                field=field,
            )
    if messages[-1][0] != "user":
        raise RequestError(
            f"{field}[{len(messages) - 1}], the last message, must have role 'user', got {messages[-1][0]!r}",
            field=field,
        )
    return messages


def has_llama3_tokens(tokenizer: TextEncoder) -> bool:
    """Whether Llama-3's template can be written in this tokenizer."""
    return all(tokenizer.special_id(name) is not None for name in LLAMA3_TOKENS)


def encode_dialog(tokenizer: TextEncoder, messages: Sequence[tuple[str, str]]) -> list[int]:
    """Token ids of a dialog that `check_dialog` passed, in Llama-3's template where its control tokens are there."""
    encode = encode_llama3 if has_llama3_tokens(tokenizer) else encode_llama2
    return encode(tokenizer, messages)


def encode_llama3(tokenizer: TextEncoder, messages: Sequence[tuple[str, str]]) -> list[int]:
    """Token ids of messages in any order; `tokenizer` has Llama-3's control tokens."""
    special = [tokenizer.special_id(name) for name in LLAMA3_TOKENS]
    begin, start, end, eot = (token_id for token_id in special if token_id is not None)

    def header(role: str) -> list[int]:
        role_ids, blank = (tokenizer.encode(text, bos=False, eos=False) for text in (role, "\n\n"))
        return [start, *role_ids, end, *blank]

    ids = [begin]
    for role, content in messages:
        ids += [*header(role), *tokenizer.encode(content.strip(), bos=False, eos=False), eot]
    return ids + header("assistant")


def encode_llama2(tokenizer: TextEncoder, messages: Sequence[tuple[str, str]]) -> list[int]:
    """Token ids of a dialog whose roles are in turn."""
    turns = [content for _, content in messages]
    if messages[0][0] == "system":
        system, first, *rest = turns
        turns = [f"{B_SYS}\n{system}\n{E_SYS}\n\n{first}", *rest]
    ids: list[int] = []
    for user, assistant in zip(turns[::2], turns[1::2], strict=False):  # the last user turn has no answer yet
        ids += tokenizer.encode(f"{B_INST} {user.strip()} {E_INST} {assistant.strip()} ", bos=True, eos=True)
    return ids + tokenizer.encode(f"{B_INST} {turns[-1].strip()} {E_INST}", bos=True, eos=False)


def _check_message(message: object, where: str, field: str) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content, got {_kind(message)}", field=field)
    for key in message:
        if key not in ("role", "content"):
            raise RequestError(f"{where} has an unknown key {key!r}; a message is role and content", field=field)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}", field=field)
    if not isinstance(content, str):
        raise RequestError(f"{where}.content must be a string, got {_kind(content)}", field=field)
    for tag in SPECIAL_TAGS:
        if tag in content:
            raise RequestError(f"{where}.content holds the special tag {tag!r}, which is not allowed", field=field)
    return str(role), content


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an empty list", str: "a string", bool: "a boolean", type(None): "nothing"}
    return "a list" if isinstance(value, list) and value else names.get(type(value), "a number")

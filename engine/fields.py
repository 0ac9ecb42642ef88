"""Fields of a request's JSON object: types and ranges, each refusal naming its field."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tpserve.engine.errors import RequestError

_MAX_TOKEN_ID = 2**31 - 1  # ids are int32 in every tokenizer; the vocabulary's own size is checked later
_MAX_SHOWN_CHARS = 60


def unknown_field(name: str, known: Iterable[str]) -> RequestError:
    """The refusal of a field that nobody reads."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(known)}"
    return RequestError(f"unknown field {shown(name)} ({hint})", field=shown(name).strip("'\""))


def shown(value: object) -> str:
    """A value as an error message shows it: short, and printable whatever it is."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**30 else "an integer of many digits"
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "…"


def boolean(name: str, value: Any) -> bool:
    """`value` as a bool."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, got {shown(value)}", field=name)
    return value


def integer(name: str, value: Any) -> int:
    """`value` as an integer of at most 64 bits; true and false are not numbers."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} must be an integer, got {shown(value)}", field=name)
    if not -(2**63) <= value < 2**64:
        raise RequestError(f"{name} must fit into 64 bits, got {shown(value)}", field=name)
    return value


def number(name: str, value: Any) -> float:
    """`value` as a finite float; true and false are not numbers."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestError(f"{name} must be a number, got {shown(value)}", field=name)
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"{name} must be finite, got {shown(value)}", field=name)
    return value if isinstance(value, float) else float(integer(name, value))


def token_ids(name: str, value: Any) -> list[int]:
    """`value` as a list of token ids."""
    if not isinstance(value, list):
        raise RequestError(f"{name} must be a list of token ids, got {shown(value)}", field=name)
    for i, token_id in enumerate(value):
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id <= _MAX_TOKEN_ID:
            raise RequestError(f"{name}[{i}] must be a token id, got {shown(token_id)}", field=name)
    return value


def string(name: str, value: Any) -> str:
    """`value` as text that UTF-8 can encode: JSON's escapes can spell half a surrogate pair."""
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a string, got {shown(value)}", field=name)
    check_unicode(name, value)
    return value


def check_unicode(name: str, text: str) -> None:
    """Refuses text that holds half a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise RequestError(f"{name} holds half a surrogate pair at character {e.start}", field=name) from None


SAMPLING: Mapping[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": integer,
    "temperature": number,
    "top_p": number,
    "top_k": integer,
    "seed": integer,
    "logprobs": boolean,
    "ignore_eos": boolean,
    "stop_token_ids": lambda name, value: tuple(token_ids(name, value)),
}

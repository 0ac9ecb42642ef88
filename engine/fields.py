"""Values of a request's JSON object: their types, each refusal naming its field. The table of fields that uses these
is `sampling_fields.py`."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
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


def count_or_flag(name: str, value: Any) -> int | None:
    """`logprobs` and its like: a count; true is 0 (of the chosen token only), false is none."""
    if isinstance(value, bool):
        return 0 if value else None
    if not isinstance(value, int):
        raise RequestError(f"{name} must be true, false or an integer, got {shown(value)}", field=name)
    return integer(name, value)


def token_ids(name: str, value: Any) -> list[int]:
    """`value` as a list of token ids."""
    if not isinstance(value, list):
        raise RequestError(f"{name} must be a list of token ids, got {shown(value)}", field=name)
    for i, token_id in enumerate(value):
        if not _is_token_id(token_id):
            raise RequestError(f"{name}[{i}] must be a token id, got {shown(token_id)}", field=name)
    return value


def one_or_more_ids(name: str, value: Any) -> tuple[int, ...]:
    """A token id, or a list of them."""
    return tuple(token_ids(name, [value] if isinstance(value, int) else value))


def string(name: str, value: Any) -> str:
    """`value` as text that UTF-8 can encode: JSON's escapes can spell half a surrogate pair."""
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a string, got {shown(value)}", field=name)
    check_unicode(name, value)
    return value


def strings(name: str, value: Any) -> tuple[str, ...]:
    """A list of strings."""
    if not isinstance(value, list):
        raise RequestError(f"{name} must be a list of strings, got {shown(value)}", field=name)
    return tuple(_element(name, i, text) for i, text in enumerate(value))


def one_or_more_strings(name: str, value: Any) -> tuple[str, ...]:
    """A string, or a list of them."""
    return (string(name, value),) if isinstance(value, str) else strings(name, value)


def check_unicode(name: str, text: str) -> None:
    """Refuses text that holds half a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise RequestError(f"{name} holds half a surrogate pair at character {e.start}", field=name) from None


def biases(name: str, value: Any) -> dict[int, float]:
    """Token id → number; JSON's keys are strings."""
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} must be an object of token ids and numbers, got {shown(value)}", field=name)
    found: dict[int, float] = {}
    for key, bias in value.items():
        is_digits = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10
        token_id = int(key) if is_digits else key
        if not _is_token_id(token_id):
            raise RequestError(f"{name} must have token ids as keys, got {shown(key)}", field=name)
        if token_id in found:
            raise RequestError(f"{name} has token id {token_id} twice", field=name)
        found[token_id] = _numbered(name, token_id, bias)
    return found


def dense_biases(name: str, value: Any, vocab_size: int | None) -> dict[int, float]:
    """The same as a list of one number a token id, zeros left out; or the object form."""
    if not isinstance(value, list):
        return biases(name, value)
    if vocab_size is not None and len(value) != vocab_size:
        raise RequestError(f"{name} has {len(value)} numbers; the vocabulary has {vocab_size} tokens", field=name)
    numbers = (_numbered(name, i, bias) for i, bias in enumerate(value))
    return {i: bias for i, bias in enumerate(numbers) if bias}


def json_text(name: str, value: Any) -> str:
    """A JSON object, or a string that spells one, as text."""
    if isinstance(value, str):
        return string(name, value)
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} must be an object or a string, got {shown(value)}", field=name)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError):  # NaN, thousands of digits, nested too deeply
        raise RequestError(f"{name} cannot be written as JSON", field=name) from None
    return string(name, text)


def json_array(texts: tuple[str, ...]) -> str:
    """Strings that `strings` passed, as a JSON list."""
    return json.dumps(texts, ensure_ascii=False)


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_TOKEN_ID


def _element(name: str, index: int, text: Any) -> str:
    try:
        return string(f"{name}[{index}]", text)
    except RequestError as e:
        raise RequestError(str(e), field=name) from None


def _numbered(name: str, index: int, value: Any) -> float:
    try:
        return number(f"{name}[{index}]", value)
    except RequestError as e:
        raise RequestError(str(e), field=name) from None

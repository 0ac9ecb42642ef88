"""From a request's body to its schema's object; every refusal names the field at fault."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic

from tpserve.engine.errors import RequestError
from tpserve.engine.fields import shown
from tpserve.handler.http import HttpRequest
from tpserve.handler.openai.errors import ModelNotFoundError
from tpserve.handler.predictions import decode, parse_json

_TOO_LONG = {"too_long": "entries", "string_too_long": "characters"}
_WORDS = [
    (re.compile(pattern), ours)
    for pattern, ours in (
        ("a valid dictionary( or instance of \\w+)?", "a JSON object"),
        ("^(Input|Value|List|String) should be ", ""),
        ("^a valid boolean", "true or false"),
        ("^a valid integer", "an integer"),
        ("^a valid ", "a "),
        ("less than or equal to", "at most"),
        ("greater than or equal to", "at least"),
        ("less than", "below"),
        ("greater than", "above"),
    )
]

M = TypeVar("M", bound=pydantic.BaseModel)


def read_body(request: HttpRequest, schema: type[M], model_name: str) -> tuple[M, dict[str, Any]]:
    """The checked request, and its fields as they were written, without nulls.

    Raises:
        RequestError: names the field.
    """
    given = _object(request.body)
    _check_finite(given)
    try:
        checked = schema.model_validate(dict(given))
    except pydantic.ValidationError as e:
        raise _refusal(given, e.errors(include_url=False)) from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    model = getattr(checked, "model", None)
    if model is not None and model != model_name:
        raise ModelNotFoundError(shown(model).strip("'\""), model_name)
    return checked, {name: value for name, value in given.items() if value is not None}


def _object(body: Any) -> Mapping[str, Any]:
    if isinstance(body, bytes | bytearray | memoryview):
        body = decode(bytes(body))
    if isinstance(body, str):
        if not body.strip():
            raise RequestError("the request has no body; send a JSON object")
        body = parse_json(body)
    if body is None:
        raise RequestError("the request has no body that can be read; send JSON with 'Content-Type: application/json'")
    if not isinstance(body, Mapping):
        raise RequestError(f"the body must be a JSON object, got {shown(body)}")
    return body


def _check_finite(given: Mapping[str, Any]) -> None:
    """NaN and Infinity are no JSON, but parsers that did not know that, and numbers like 1e999, make them."""
    stack: list[tuple[str, Any]] = [(str(name), value) for name, value in given.items()]
    while stack:
        where, value = stack.pop()
        if isinstance(value, Mapping):
            stack.extend((f"{where}.{key}", child) for key, child in value.items())
        elif isinstance(value, list):
            stack.extend((f"{where}[{i}]", child) for i, child in enumerate(value) if not isinstance(child, int | str))
        elif isinstance(value, float) and not math.isfinite(value):
            raise RequestError(f"{shown(where)[1:-1]} must be finite, got {value}", field=shown(where)[1:-1])


def _refusal(given: Mapping[str, Any], errors: Sequence[Any]) -> RequestError:
    """Of all that a union's branches say, what the one says that came the farthest."""
    depth, field, first = max(((*_place(given, error), error) for error in errors), key=lambda found: found[0])
    if first["type"] in ("missing", "union_tag_not_found"):
        return RequestError(f"{field} is missing", field=field)
    same = [e for e in errors if _place(given, e) == (depth, field) and e["type"] != "none_required"]
    for error in same:
        if error["type"] in _TOO_LONG:
            limit, unit = error["ctx"]["max_length"], _TOO_LONG[error["type"]]
            return RequestError(f"{field} has {len(error['input'])} {unit}, {limit} are admitted", field=field)
    rules = " or ".join(dict.fromkeys(map(_rule, same))) or "null"
    value = shown(first["ctx"]["tag"] if first["type"] == "union_tag_invalid" else first["input"])
    return RequestError(f"{field}: must be {rules}, got {value}", field=field)


def _rule(error: Any) -> str:
    """What a value must be, in our words."""
    ctx = error.get("ctx", {})
    match error["type"]:
        case "union_tag_invalid":
            return f"one of {ctx['expected_tags']}"
        case "literal_error":
            return str(ctx["expected"])
        case "too_short" | "string_too_short":
            return "a non-empty one"
        case "string_pattern_mismatch":
            return f"like {ctx['pattern']}"
    rule: str = error["msg"]
    for theirs, ours in _WORDS:
        rule = theirs.sub(ours, rule)
    return rule


def _place(given: Mapping[str, Any], error: Any) -> tuple[int, str]:
    """How deep in the request an error is, and where; a location also names the branches of unions."""
    value: Any = given
    depth, where = 0, ""
    for key in error["loc"]:
        if isinstance(key, int) and isinstance(value, list) and key < len(value):
            value, where = value[key], f"{where}[{key}]"
        elif isinstance(key, str) and isinstance(value, Mapping) and key in value:
            value, where = value[key], f"{where}.{key}"
        else:
            continue
        depth += 1
    if error["type"] == "missing":
        depth, where = depth + 1, f"{where}.{error['loc'][-1]}"
    elif error["type"].startswith("union_tag"):
        where += ".role"
    # A key may be anything, and half a surrogate pair is no UTF-8.
    return depth, ascii(where.removeprefix("."))[1:-1]

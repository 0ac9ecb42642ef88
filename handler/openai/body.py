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

_DICT = re.compile(r"a valid dictionary( or instance of \w+)?")

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
    if first["type"] == "missing":
        return RequestError(f"{field} is missing", field=field)
    said = [
        _DICT.sub("a JSON object", e["msg"])
        for e in errors
        if _place(given, e) == (depth, field) and e["type"] != "none_required"
    ]
    rules = " or ".join(dict.fromkeys(said)) or "must be null"
    return RequestError(f"{field}: {rules}, got {shown(first['input'])}", field=field)


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

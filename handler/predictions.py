"""The predictions API's request forms. Pure functions that raise nothing but `RequestError`."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Mapping
from typing import Any

from tpserve.engine import fields
from tpserve.engine.errors import RequestError
from tpserve.engine.limits import MAX_JSON_DEPTH, MAX_PROMPTS, at_most
from tpserve.engine.requests import KNOWN_FIELDS as REQUEST_FIELDS
from tpserve.engine.requests import Prompt, RequestReader, check_names, read_dialog, read_prompt, read_urgency
from tpserve.engine.sampling_params import SamplingParams
from tpserve.handler.http import HttpRequest

KNOWN_FIELDS = (*REQUEST_FIELDS, "stream", "mode")
MODES = ("text_completion", "chat")
# Brackets; strings are passed over, as no bracket in them is one.
_BRACKETS = re.compile(r'[\[\]{}]|"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


class Form(enum.Enum):
    """How a request was written, and so how it is answered."""

    OBJECT = "object"
    TEXT = "text"
    DIALOGS = "dialogs"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A request that is well formed: what to generate and how to answer; see `GenerateRequest`."""

    form: Form
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    stream: bool = False
    priority: int = 0
    timeout_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What the operator set for requests that do not say.

    Attributes:
        params: sampling parameters.
        max_new_tokens_cap: no request gets more tokens; None: the context's end only.
        mode: what a list of dialogs as the whole body needs: "chat".
    """

    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    max_new_tokens_cap: int | None = None
    mode: str = "text_completion"


def parse_request(request: HttpRequest, defaults: Defaults, reader: RequestReader) -> Prediction:
    """Reads a request.

    Args:
        request: as the front hands it over.
        defaults: the operator's.
        reader: of the model's fields.

    Raises:
        RequestError: with the field at fault.
    """
    return parse_body(readable_body(request), request.content_type, defaults, reader)


def readable_body(request: HttpRequest) -> Any:
    """The body.

    Raises:
        RequestError: there is none that could be read.
    """
    if request.body is None:
        raise RequestError(
            "the request has no body that can be read; send JSON with the header 'Content-Type: application/json'",
            field="prompt",
        )
    return request.body


def parse_body(body: Any, content_type: str, defaults: Defaults, reader: RequestReader) -> Prediction:
    """Reads one body; see `parse_request`."""
    is_json = content_type.partition(";")[0].strip().lower() == "application/json"
    if isinstance(body, bytes | bytearray | memoryview):
        body = decode(bytes(body))
        if is_json or body.lstrip().startswith(("{", "[")):
            body, is_json = parse_json(body), True
    elif isinstance(body, str) and not is_json and body.lstrip().startswith(("{", "[")):
        body, is_json = parse_json(body), True
    if isinstance(body, Mapping):
        return _object(body, defaults, reader)
    if isinstance(body, list):
        return _dialogs(body, defaults, reader)
    if is_json or not isinstance(body, str):
        raise RequestError(f"the body must be a JSON object with a prompt or a dialog, got {fields.shown(body)}")
    if not body.strip():
        raise RequestError("the request has no prompt: its body is empty", field="prompt")
    return Prediction(Form.TEXT, (Prompt("prompt", fields.string("prompt", body)),), _params({}, defaults, reader))


def decode(body: bytes) -> str:
    """UTF-8, less a byte order mark.

    Raises:
        RequestError: it is not.
    """
    try:
        return body.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        raise RequestError(f"the body is not UTF-8: {e.reason} at byte {e.start}") from None


def parse_json(text: str) -> Any:
    """JSON as its standard has it: no NaN, no name twice.

    Raises:
        RequestError: it is not.
    """
    _check_depth(text)
    try:
        return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RequestError:
        raise
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except json.JSONDecodeError as e:
        raise RequestError(f"the body is not JSON: {e.msg} at line {e.lineno}, column {e.colno}") from None
    except ValueError:  # Python refuses to read integers of thousands of digits
        raise RequestError("the body holds a number of too many digits") from None


def _check_depth(text: str) -> None:
    """Before anything is built of it: parsers and schemas go down as far as a text does."""
    if text.count("[") + text.count("{") <= MAX_JSON_DEPTH:
        return
    depth = deepest = 0
    for found in _BRACKETS.finditer(text):
        match found[0][0]:
            case "[" | "{":
                depth += 1
                deepest = max(deepest, depth)
            case "]" | "}":
                depth -= 1
    if deepest > MAX_JSON_DEPTH:
        raise RequestError(f"the body is nested {deepest} levels deep, {MAX_JSON_DEPTH} are admitted")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise RequestError(f"{fields.shown(name)} is given twice", field=fields.shown(name).strip("'\""))
    return found


def _no_constant(literal: str) -> Any:
    raise RequestError(f"the body is not JSON: {literal} is no number there")


def _object(body: Mapping[Any, Any], defaults: Defaults, reader: RequestReader) -> Prediction:
    check_names(body, KNOWN_FIELDS)
    given = {name: value for name, value in body.items() if value is not None}
    prompt = _prompt(given)
    stream = fields.boolean("stream", given.get("stream", True))
    priority, timeout_s = read_urgency(given)
    params = _params(given, defaults, reader)
    return Prediction(Form.OBJECT, (prompt,), params, stream, priority, timeout_s)


def _prompt(given: Mapping[str, Any]) -> Prompt:
    mode = given.get("mode")
    if mode is not None and mode not in MODES:
        raise RequestError(f"mode must be one of {', '.join(MODES)}, got {fields.shown(mode)}", field="mode")
    prompt = read_prompt(given, wanted="dialog" if mode == "chat" else "prompt")
    if mode is not None and (mode == "chat") != (prompt.field == "dialog"):
        raise RequestError(f"mode {mode!r} does not go with {prompt.field}", field="mode")
    return prompt


def _dialogs(body: list[Any], defaults: Defaults, reader: RequestReader) -> Prediction:
    if defaults.mode != "chat":
        raise RequestError("a list of dialogs as the body needs mode: chat in model-config.yaml", field="mode")
    if not body:
        raise RequestError("the body is an empty list; it must hold dialogs", field="dialog")
    at_most("dialogs", len(body), MAX_PROMPTS, field="dialog")
    prompts = tuple(Prompt(f"dialogs[{i}]", read_dialog(dialog, f"dialogs[{i}]")) for i, dialog in enumerate(body))
    return Prediction(Form.DIALOGS, prompts, _params({}, defaults, reader))


def _params(given: Mapping[str, Any], defaults: Defaults, reader: RequestReader) -> SamplingParams:
    return reader.params(given, defaults.params, defaults.max_new_tokens_cap)

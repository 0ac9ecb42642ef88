"""What goes back: bytes of JSON, and what TorchServe must be told about them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import msgspec

from tpserve.engine.errors import EngineError, OverloadedError, RequestError, public

JSON = "application/json"
NDJSON = "application/x-ndjson"

# A path of two or more parts that begins at the root, and the addresses in Python's names of objects.


@dataclasses.dataclass(frozen=True)
class Reply:
    """One message to one client.

    Attributes:
        body: of the whole reply, or one chunk of a stream.
        more: None: this is the whole reply; True: a chunk, others follow; False: the last chunk of a stream that has
            begun.
        status, content_type, headers: of the reply; fixed by a stream's first chunk.
    """

    body: bytes
    content_type: str = JSON
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    more: bool | None = None


def failed(message: str) -> dict[str, Any]:
    """What ends a stream that has begun and cannot go on."""
    return {"error": {"message": message, "field": None, "code": 503}}


def json_line(content: Any) -> bytes:
    """One JSON value, newline-terminated."""
    return msgspec.json.encode(content) + b"\n"


def json_reply(content: Any, status: int = 200) -> Reply:
    """A whole reply of one JSON value."""
    return Reply(json_line(content), JSON, status)


def error_reply(error: Exception) -> Reply:
    """A whole reply that says what went wrong; faults of ours say no more than that they are."""
    field: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    message = str(error)
    match error:
        case OverloadedError():
            status, headers = error.status, (("Retry-After", str(error.retry_after_s)),)
        case RequestError():
            status, field = error.status, error.field
        case EngineError():
            status, message = 503, public(message)
        case _:
            status, message = 500, "internal error"
    content = {"error": {"message": message, "field": field, "code": status}}
    # json and not msgspec: a message may quote text that UTF-8 cannot spell.
    return Reply(json.dumps(content).encode() + b"\n", JSON, status, headers)

"""Errors as OpenAI's clients read them."""

from __future__ import annotations

import json
import logging
from typing import Any

from tpserve.engine.errors import EngineError, OverloadedError, RequestError, public
from tpserve.handler.replies import JSON, Reply

_CODES = {404: "not_found", 405: "method_not_allowed", 429: "rate_limit_exceeded", 500: "internal_error",
          503: "unavailable"}  # fmt: skip

logger = logging.getLogger(__name__)


class ModelNotFoundError(RequestError):
    """A model that is not served here."""

    def __init__(self, name: str, served: str) -> None:
        super().__init__(f"model {name!r} is not served here; {served!r} is", field="model", status=404)


def error_body(status: int, message: str, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """What an error says.

    Args:
        status: the HTTP status.
        message: for people.
        field: of the request, at fault.
        code: for programs; None: the status's own, if it has one.
    """
    kind = "invalid_request_error" if status < 500 else "server_error"
    if field is not None and field not in message:
        message = f"{field}: {message}"
    return {"error": {"message": message, "type": kind, "param": field, "code": code or _CODES.get(status)}}


def error_reply(error: Exception) -> Reply:
    """A whole reply; faults of ours say no more than that they are."""
    headers: tuple[tuple[str, str], ...] = ()
    match error:
        case ModelNotFoundError():
            status, body = 404, error_body(404, str(error), error.field, "model_not_found")
        case RequestError():
            status = error.status
            if isinstance(error, OverloadedError):
                headers = (("Retry-After", str(error.retry_after_s)),)
            body = error_body(status, str(error), error.field)
        case EngineError():
            status, body = 503, error_body(503, public(str(error)))
        case _:
            logger.error("a fault of ours", exc_info=error)
            status, body = 500, error_body(500, "internal error")
    # json and not msgspec: a message may quote text that UTF-8 cannot spell.
    return Reply(json.dumps(body).encode() + b"\n", JSON, status, headers)

"""Refusals and failures in Triton's words: one line of text, which names the field."""

from __future__ import annotations

import json

from tpserve.engine.errors import EngineError, RequestError, public
from tpserve.handler.replies import Reply, error_reply


def error_text(error: Exception) -> str:
    """What to say of an error; of faults of ours no more than that they are."""
    text = str(error) if isinstance(error, RequestError) else "internal error"
    if isinstance(error, EngineError):
        text = public(str(error))
    field = error.field if isinstance(error, RequestError) else None
    return text if field is None or field in text else f"{field}: {text}"


def triton_error(error: Exception) -> Reply:
    """A whole reply."""
    reply = error_reply(error)
    return Reply(
        json.dumps({"error": error_text(error)}).encode() + b"\n", reply.content_type, reply.status, reply.headers
    )

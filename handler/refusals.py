"""What the second front says no to by itself, in the words of the protocol whose path was asked for."""

from __future__ import annotations

from tpserve.handler.openai.errors import error_body
from tpserve.handler.replies import Reply, json_reply

_OPENAI_PATHS = ("v1/", "tokenize", "detokenize", "version")


class Refusal(Exception):  # noqa: N818 — no error of ours: an answer
    """A request that the front answers before any protocol sees it.

    Attributes:
        status: of the reply.
        headers: of the reply.
    """

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = tuple((name.replace("_", "-"), value) for name, value in headers.items())


def refusal_reply(path: str, refusal: Refusal) -> Reply:
    """A whole reply.

    Args:
        path: as in `HttpRequest`.
        refusal: what to say.
    """
    status, message = refusal.status, str(refusal)
    if path == "v1" or path.startswith(_OPENAI_PATHS):
        reply = json_reply(error_body(status, message, code="invalid_api_key" if status == 401 else None), status)
    elif path == "v2" or path.startswith("v2/"):
        reply = json_reply({"error": message}, status)
    else:
        reply = json_reply({"error": {"message": message, "field": None, "code": status}}, status)
    return Reply(reply.body, reply.content_type, status, refusal.headers)

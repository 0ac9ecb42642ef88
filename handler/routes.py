"""Which protocol a path belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from tpserve.handler.http import HttpRequest, Signal
from tpserve.handler.open_request import Pending
from tpserve.handler.openai import chat, completions, utilities
from tpserve.handler.replies import Reply
from tpserve.handler.triton import endpoints as triton

if TYPE_CHECKING:
    from tpserve.handler.backend import Backend


class Endpoint(Protocol):
    """Starts what a request to one path asks for; see `Backend.serve`. A `TpserveError` becomes its reply."""

    def __call__(
        self, backend: Backend, request_id: str, request: HttpRequest, signal: Signal, stream: bool
    ) -> Pending | Reply: ...


# Paths as in `HttpRequest`; one that ends in a slash stands for all below it.
ENDPOINTS: Mapping[str, Endpoint] = {
    "v1/": utilities.unknown,
    "v1/chat/completions": chat.chat_completions,
    "v1/completions": completions.completions,
    "v1/models": utilities.models,
    "v1/models/": utilities.models,
    "tokenize": utilities.tokenize,
    "detokenize": utilities.detokenize,
    "version": utilities.version,
    "openapi.json": utilities.document,
    "v2": triton.server,
    "v2/health/live": triton.live,
    "v2/health/ready": triton.ready,
    "v2/models/": triton.models,
}


def find_endpoint(path: str) -> Endpoint | None:
    """Whose a path is; the longest that fits."""
    if path in ENDPOINTS:
        return ENDPOINTS[path]
    above = [known for known in ENDPOINTS if known.endswith("/") and path.startswith(known)]
    return ENDPOINTS[max(above, key=len)] if above else None

"""What TorchServe hands to a handler, as far as we use it, and how a reply is given back to it."""

from __future__ import annotations

import http
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from tpserve.handler.replies import Reply


class Context(Protocol):
    """TorchServe's `ts.context.Context`. `request_ids` maps the index of a request in the batch to its id."""

    request_ids: dict[int, str]
    stopping_criteria: dict[int, Callable[[Any], bool | None]] | None
    model_yaml_config: Mapping[str, Any]

    @property
    def system_properties(self) -> Mapping[str, Any]: ...
    def get_all_request_header(self, idx: int) -> Mapping[str, Any]: ...
    def set_response_status(self, code: int, phrase: str, idx: int) -> None: ...
    def set_response_content_type(self, idx: int, value: str) -> None: ...
    def set_response_header(self, idx: int, key: str, value: str) -> None: ...


def put_reply(context: Context, index: int, reply: Reply) -> bytes:
    """Tells TorchServe about the reply to request number `index`; returns what goes into the list of results."""
    context.set_response_content_type(index, reply.content_type)
    for name, value in reply.headers:
        context.set_response_header(index, name, value)
    if reply.status != 200:
        context.set_response_status(reply.status, http.HTTPStatus(reply.status).phrase, index)
    if context.stopping_criteria is not None:
        # TorchServe asks "is this the end?": None is its word for a reply that is no stream.
        end = None if reply.more is None else not reply.more
        context.stopping_criteria[index] = lambda _result: end
    return reply.body

"""What TorchServe hands to a handler, as far as we use it, and how a reply is given back to it."""

from __future__ import annotations

import http
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from tpserve.handler.http import HttpRequest
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


def read_request(parameters: Mapping[str, Any], headers: Mapping[str, Any]) -> HttpRequest:
    """A request as TorchServe hands it over.

    Args:
        parameters: `body` (or a form's `data`): bytes, text, or JSON that TorchServe has parsed already.
        headers: the HTTP headers, `url_path`, and a dict with `content-type` under each parameter's name.
    """
    name = next((name for name in ("body", "data") if name in parameters), None)
    about = headers.get(name or "")
    return HttpRequest(
        path=str(headers.get("url_path") or "").strip("/"),
        body=None if name is None else parameters[name],
        content_type=str(about.get("content-type") or "") if isinstance(about, Mapping) else "",
        headers={name.lower(): value for name, value in headers.items() if isinstance(value, str)},
    )


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

"""A request as every front hands it over: TorchServe's mailbox and the ASGI front."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

MAX_HEADERS = 100


@dataclasses.dataclass(frozen=True)
class HttpRequest:
    """One HTTP request.

    Attributes:
        path: without slashes at its ends; what follows `/predictions/<model>/<version>/` on TorchServe.
        body: bytes, or the JSON value that TorchServe has parsed already; None: there is none that can be read.
        content_type: of the body, as the client said.
        headers: names in lower case.
        method: in upper case; TorchServe does not tell.
    """

    path: str = ""
    body: Any = b""
    content_type: str = ""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    method: str = "POST"


class Signal(Protocol):
    """Whom to tell that a request has something new; `threading.Event` is one."""

    def set(self) -> None: ...

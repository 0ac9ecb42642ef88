"""What can go wrong, as a tree:

TpserveError
├── ConfigError          the operator's configuration cannot be served
│   ├── MissingDevicesError  with so few devices
│   └── SelfTestError        the ranks compute something else than the checkpoint says
├── RequestError         this request cannot be served; others are untouched
│   └── OverloadedError  not now: try again after `retry_after_s`
└── EngineError          the rank group failed
"""

from __future__ import annotations

import re

_PATH = re.compile(r"(?<![\w.:/#])(?:/[^\s/:;,'\"()\[\]]+)+/([^\s/:;,'\"()\[\]]+)")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{4,}\b")


class TpserveError(Exception):
    """Root of what this package raises on purpose."""


class ConfigError(TpserveError, ValueError):
    """A configuration that cannot be served; the message names the key and what to do."""


class MissingDevicesError(ConfigError):
    """There are fewer devices than ranks.

    Attributes:
        num_devices: that there are.
    """

    def __init__(self, message: str, num_devices: int) -> None:
        super().__init__(message)
        self.num_devices = num_devices


class SelfTestError(ConfigError):
    """The ranks compute something else than the checkpoint says."""


class RequestError(TpserveError, ValueError):
    """A request that is refused.

    Attributes:
        field: the request's field at fault, or None when it is the body as a whole.
        status: the HTTP status that says so.
    """

    def __init__(self, message: str, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.field = field
        self.status = status


class OverloadedError(RequestError):
    """The queue is full.

    Attributes:
        retry_after_s: when it is worth trying again.
    """

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message, field=None, status=429)
        self.retry_after_s = retry_after_s


class EngineError(TpserveError, RuntimeError):
    """The rank group died, hung, or disagreed."""


def public(message: str) -> str:
    """What happened to us, as strangers may read it: files by their names alone, no addresses, no traceback."""
    if "Traceback (most recent call last)" in message:
        message = message.strip().splitlines()[-1]
    return _ADDRESS.sub("0x…", _PATH.sub(r"\1", message))

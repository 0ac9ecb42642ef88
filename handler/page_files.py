"""The chat page: files that the second front hands out as they are, to whoever asks."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping

from tpserve.handler.replies import Reply

_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "chat.js": "text/javascript; charset=utf-8",
    "stream.js": "text/javascript; charset=utf-8",
}

# Nothing from elsewhere, nothing inline, nobody around it: what a model says cannot become a script.
PAGE_HEADERS = (
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    ),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cache-control", "no-cache"),
)


def _read() -> Mapping[str, Reply]:
    folder = importlib.resources.files("tpserve.handler") / "page"
    replies = {f"/page/{name}": Reply((folder / name).read_bytes(), kind) for name, kind in _TYPES.items()}
    return {"/": replies["/page/index.html"], **replies}


# By the URL's path.
PAGE = _read()

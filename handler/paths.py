"""What the second front knows of paths: which there are, how they may be asked for, and which need no key."""

from __future__ import annotations

import re

from tpserve.handler.routes import ENDPOINTS

_BUILT_IN = ("health", "health/live", "health/ready", "metrics", "status", "trace/")
_GET = ("GET", "HEAD")
# Of all that is not asked for with GET.
_POSTED = re.compile(
    r"(v1/(?!models(/|$)).*|tokenize|detokenize|v2/.*/(generate|generate_stream|infer)|v2/repository/.*)"
)
_VERSION = re.compile(r"[0-9]+(\.[0-9]+)*")


def inner_path(path: str, model: str) -> str | None:
    """The path as every front says it, "" for a prediction.

    Args:
        path: of the URL, decoded.
        model: what users call it; below `predictions/<model>` stand the same paths as below TorchServe's.

    Returns:
        None: it is another model's.
    """
    path = path.strip("/")
    if path != "predictions" and not path.startswith("predictions/"):
        return path or "/"  # the page's; nothing else is there
    inner = path.removeprefix("predictions").removeprefix("/")
    if inner != model and not inner.startswith(model + "/"):
        return None
    inner = inner.removeprefix(model).removeprefix("/")
    version, _, rest = inner.partition("/")
    return rest if _VERSION.fullmatch(version) else inner


def family(path: str) -> str | None:
    """The entry of the tables that a path belongs to; None: nothing is there."""
    tables = (*_BUILT_IN, *ENDPOINTS)
    if path in ("", "trace") or path in tables:
        return path
    above = [known for known in tables if known.endswith("/") and path.startswith(known)]
    return max(above, key=len) if above else None


def methods(path: str) -> tuple[str, ...] | None:
    """How a path may be asked for; None: nothing is there, which its protocol says itself."""
    if family(path) == "v1/":
        return None
    if path == "":
        return ("POST", "PUT")  # `curl -T` puts
    return ("POST",) if _POSTED.fullmatch(path) else _GET


def is_open(path: str) -> bool:
    """Whether a path is for whoever asks, without a key and however busy: probes have none and must not fail."""
    return path == "health" or path.startswith(("health/", "v2/health/"))


def known_paths() -> str:
    """For a message."""
    return ", ".join(f"/{path}" for path in sorted({"predictions/<model>", *_BUILT_IN, *ENDPOINTS}))

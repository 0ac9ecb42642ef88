"""What is kept of HTTP requests: a line in the access log, and counts for Prometheus."""

from __future__ import annotations

import datetime
import json
import logging
from collections import Counter

from tpserve.handler import paths
from tpserve.handler.page_files import PAGE
from tpserve.handler.wire import Wire

_NAME = "tpserve:http_requests_total"

access = logging.getLogger("tpserve.access")


class Accounts:
    """Counts and writes down requests that have ended."""

    def __init__(self) -> None:
        self._ended: Counter[tuple[str, int]] = Counter()

    def ended(self, wire: Wire, inner: str | None, seconds: float) -> None:
        """Takes one.

        Args:
            wire: of the request.
            inner: its path, see `paths.inner_path`.
            seconds: that it took.
        """
        self._ended[_label(wire, inner), wire.status] += 1
        if access.isEnabledFor(logging.INFO):
            access.info("%s", json.dumps(_line(wire, seconds)))

    def metrics(self) -> bytes:
        """Prometheus' text of the counts."""
        lines = [f"# HELP {_NAME} HTTP requests that ended.", f"# TYPE {_NAME} counter"]
        for (path, status), count in sorted(self._ended.items()):
            lines.append(f'{_NAME}{{path="{path}",status="{status}"}} {count}')
        return ("\n".join(lines) + "\n").encode()


def _label(wire: Wire, inner: str | None) -> str:
    """A path for the counts: there are as many as there are endpoints, whatever clients think of."""
    if wire.path in PAGE:
        return "/"
    family = None if inner is None else paths.family(inner)
    return "other" if family is None else f"/{family or 'predictions'}"


def _line(wire: Wire, seconds: float) -> dict[str, object]:
    now = datetime.datetime.now(datetime.UTC)
    return {
        "time": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "client": wire.client,
        "method": wire.method[:20],
        "path": wire.path[:256],
        "status": wire.status,
        "duration_ms": round(seconds * 1000, 1),
        "bytes_out": wire.bytes_out,
        "request_id": wire.request_id,
    }

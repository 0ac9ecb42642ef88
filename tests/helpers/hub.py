"""As much of the Hugging Face Hub as a download needs: a repository's files over HTTP, and what can go wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Hub:
    """One repository.

    Attributes:
        repo: its name.
        files: content by path.
        token: that a request must bring; None: none.
        gated: refuse as a gated repository does.
        break_after: by path: so many bytes are sent, then the connection breaks; the next request for it gets 503.
        served: by path: what was sent, whatever the Hub says of it.
        requests: (method, path, value of the Range header) so far.
        address: of the server.
    """

    repo: str
    files: dict[str, bytes]
    token: str | None = None
    gated: bool = False
    break_after: dict[str, int] = dataclasses.field(default_factory=dict)
    served: dict[str, bytes] = dataclasses.field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = dataclasses.field(default_factory=list)
    address: str = ""
    unavailable: set[str] = dataclasses.field(default_factory=set)

    def info(self) -> dict[str, Any]:
        """The answer to `/api/models/REPO`."""
        siblings = []
        for path, data in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            sibling: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": blob}
            if len(data) > 1000:
                sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(sibling)
        return {"_id": "1", "id": self.repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}

    def ranges(self, path: str) -> list[str | None]:
        """The Range headers of the requests for a file's content."""
        return [value for method, asked, value in self.requests if method == "GET" and asked.endswith("/" + path)]


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves it on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *args: Any) -> None:
            """Says nothing."""

        def _answer(self, *, body: bool) -> None:
            url = urlsplit(self.path)
            hub.requests.append((self.command, url.path, self.headers["Range"]))
            if hub.token is not None and self.headers["Authorization"] != f"Bearer {hub.token}":
                code = "GatedRepo" if hub.gated else "RepoNotFound"
                self._send(401, b'{"error": "Invalid username or password."}', {"X-Error-Code": code}, body)
                return
            if url.path.startswith(f"/api/models/{hub.repo}"):
                if url.path.endswith("/revision/nowhere"):
                    self._send(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"}, body)
                    return
                assert parse_qs(url.query).get("blobs")
                self._send(200, json.dumps(hub.info()).encode(), {"Content-Type": "application/json"}, body)
                return
            prefix = f"/{hub.repo}/resolve/{COMMIT}/"
            path = url.path.removeprefix(prefix)
            if not url.path.startswith(prefix) or path not in hub.files:
                self._send(404, b'{"error": "not found"}', {"X-Error-Code": "RepoNotFound"}, body)
                return
            self._file(path, body)

        def _file(self, path: str, body: bool) -> None:
            data = hub.served.get(path, hub.files[path])
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            if not body:
                self._send(200, data, headers, False)
                return
            if path in hub.unavailable:
                hub.unavailable.remove(path)
                self._send(500, b"{}", {}, True)
                return
            begin = 0
            if self.headers["Range"]:
                begin = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            limit = hub.break_after.pop(path, None)
            if limit is not None:
                hub.unavailable.add(path)
            self._send(206 if begin else 200, data[begin:], headers, True, limit)

        def _send(
            self, status: int, data: bytes, headers: dict[str, str], body: bool, limit: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data[:limit])
            if limit is not None:
                self.wfile.flush()
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

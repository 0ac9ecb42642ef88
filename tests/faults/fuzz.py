"""`python -m tests.faults.fuzz --url http://… --requests 10000`: strangers against a running server, while one stream
must go on as if it were alone.

Beside the requests, slow senders (slowhttptest's slow headers and slow bodies) hold connections open. The exit code is
1 if a stream had other tokens than alone, a status came that nobody declared, or the server did not become idle again.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import re
import sys
import time
import urllib.parse
from typing import Any

from tests.faults.fuzz_requests import Fuzzer

# TorchServe says 507 where there is no memory left, which is not declared.
DECLARED = {200, 400, 401, 404, 405, 408, 411, 413, 414, 415, 417, 429, 431, 501, 503, 505}
_STREAM: dict[str, Any] = {"text_input": "once upon a time", "max_tokens": 200, "random_seed": 5, "temperature": 0.8,
                           "ignore_eos": True, "priority": -1}  # fmt: skip
_TIMEOUT_S = 120.0
_SLOW_BYTE_S = 1.0


class Target:
    """A server.

    Args:
        url: where the protocols' paths begin.
        key: that is asked for; "": none.
    """

    def __init__(self, url: str, key: str) -> None:
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname is not None
        self.host, self.port = parts.hostname, parts.port or 80
        self.prefix = parts.path.rstrip("/")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def send(self, raw: bytes, end: bool = False, timeout_s: float = _TIMEOUT_S) -> tuple[int, bytes]:
        """Status and all that came back; status 0: the connection was closed without a word.

        Args:
            raw: what to send.
            timeout_s: for the reply.
            end: say that nothing follows, which servers may take for a client that has gone.
        """
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=1 << 22)
        try:
            with contextlib.suppress(ConnectionError):  # it may be refused before it is read
                writer.write(raw)
                if end:
                    writer.write_eof()
            received = b""
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(timeout_s):
                    # TorchServe does not close when it is asked to.
                    while not _is_whole(received, raw) and (more := await reader.read(1 << 20)):
                        received += more
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        head = re.match(rb"HTTP/1\.[01] (\d+)", _without_100(received))
        return (int(head[1]) if head else 0), received

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """A request that is right."""
        content = b"" if body is None else json.dumps(body).encode()
        headers = {"Host": "x", "Connection": "close", "Content-Length": str(len(content)), **self.headers}
        if body is not None:
            headers["Content-Type"] = "application/json"
        lines = [f"{method} {self.prefix}/{path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
        return await self.send("\r\n".join([*lines, "", ""]).encode() + content)

    async def stream(self) -> str:
        """What the one stream says."""
        status, received = await self.ask("POST", "v2/models/ensemble/generate_stream", _STREAM)
        events = re.findall(rb"data: (\{.*?\})\n\n", received)
        if status != 200 or not events:
            return f"status {status}: {received[-300:]!r}"
        return "".join(json.loads(event).get("text_output", f"<{event!r}>") for event in events)


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Counts, and under "violations" what must not be."""
    target = Target(arguments.url, arguments.key)
    began = await _idle(target)
    assert began, "the server is not idle"
    status, received = await target.ask("GET", "openapi.json")
    assert status == 200, received[:1000]
    document = json.loads(received[received.index(b"{", received.index(b"\r\n\r\n")) : received.rindex(b"}") + 1])
    schemas = document["components"]["schemas"]
    fuzzer = Fuzzer(arguments.seed, target.prefix, arguments.predictions, target.headers, schemas)
    alone = await target.stream()
    assert len(alone) > 200, alone
    assert alone == await target.stream()
    statuses: collections.Counter[tuple[str, int]] = collections.Counter()
    violations: list[str] = []
    left = iter(range(arguments.requests))
    done = asyncio.Event()
    began_s = time.monotonic()

    async def strangers() -> None:
        for number in left:
            asked = fuzzer.request()
            odd = asked.kind in ("no HTTP", "odd head")
            try:
                patience_s = arguments.patience_s if odd else _TIMEOUT_S
                status, received = await target.send(asked.raw, asked.kind == "no HTTP", patience_s)
            except (OSError, TimeoutError) as e:
                status, received = -1, repr(e).encode()
            statuses[asked.kind, status] += 1
            if status not in DECLARED and not (status in (0, -1) and odd):
                violations.append(f"{number}: {status} to {asked.raw[:300]!r}: {received[:300]!r}")

    async def one_stream() -> int:
        count = 0
        while not done.is_set():
            said = await target.stream()
            count += 1
            if said != alone:
                violations.append(f"the stream said {said[-300:]!r}")
        return count

    slow = [asyncio.create_task(_slow(target, kind)) for kind in ("headers", "body") for _ in range(arguments.slow)]
    streaming = asyncio.create_task(one_stream())
    await asyncio.gather(*(strangers() for _ in range(arguments.concurrency)))
    took_s = time.monotonic() - began_s
    cut = [await task for task in slow]
    done.set()
    num_streams = await streaming
    idle = await _idle(target)
    violations += [] if idle else ["blocks are in use that nobody uses, or the server is not ready"]
    return {
        "requests": sum(statuses.values()),
        "seconds": round(took_s, 1),
        "statuses": dict(sorted(collections.Counter(_by_status(statuses)).items())),
        "kinds": dict(sorted(collections.Counter(_by_kind(statuses)).items())),
        "streams beside them, all as alone": num_streams,
        "slow senders cut off": dict(collections.Counter(cut)),
        "violations": violations[:20],
    }


def _without_100(received: bytes) -> bytes:
    """Whoever expects 100 is told that first."""
    return received.partition(b"\r\n\r\n")[2] if received.startswith(b"HTTP/1.1 100") else received


def _is_whole(received: bytes, asked: bytes) -> bool:
    head, end, body = _without_100(received).partition(b"\r\n\r\n")
    if not end:
        return False
    if asked.startswith(b"HEAD "):
        return True
    if re.search(rb"\r\ntransfer-encoding: *chunked", head, re.IGNORECASE):
        return body.endswith(b"\r\n0\r\n\r\n") or body == b"0\r\n\r\n"
    length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    return length is not None and len(body) >= int(length[1])


async def _slow(target: Target, kind: str) -> str:
    """Sends a byte a second; says how that ended."""
    began_s = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection(target.host, target.port)
    except OSError as e:
        return f"{kind}: {e!r}"
    head = f"POST {target.prefix}/v1/completions HTTP/1.1\r\nHost: x\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in target.headers.items())
    head += "X-Slow: " if kind == "headers" else "Content-Type: application/json\r\nContent-Length: 5000\r\n\r\n"
    ended = asyncio.create_task(reader.read(65536))
    try:
        writer.write(head.encode())
        while not ended.done() and time.monotonic() - began_s < _TIMEOUT_S:
            writer.write(b" ")
            await writer.drain()
            await asyncio.wait([ended], timeout=_SLOW_BYTE_S)
        if not ended.done():
            return f"{kind}: still open after {_TIMEOUT_S:g} s"
        status = ended.result()[9:12].decode() or "closed"
    except ConnectionError:
        status = "closed"
    finally:
        ended.cancel()
        writer.close()
    return f"{kind}: {status}"


async def _idle(target: Target) -> bool:
    for _ in range(100):
        health, _ = await target.ask("GET", "health/ready")
        _, status = await target.ask("GET", "status")
        if health == 200 and set(re.findall(rb'"num_blocks_in_use": ?(\d+)', status)) == {b"0"}:
            return True
        await asyncio.sleep(0.2)
    return False


def _by_status(statuses: collections.Counter[tuple[str, int]]) -> dict[int, int]:
    found: collections.Counter[int] = collections.Counter()
    for (_, status), count in statuses.items():
        found[status] += count
    return found


def _by_kind(statuses: collections.Counter[tuple[str, int]]) -> dict[str, int]:
    found: collections.Counter[str] = collections.Counter()
    for (kind, _), count in statuses.items():
        found[kind] += count
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True, help="where the protocols' paths begin")
    parser.add_argument("--key", default="")
    parser.add_argument("--predictions", default="", help="the path of our own protocol, below the URL")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--slow", type=int, default=100, help="slow senders of each kind")
    parser.add_argument("--patience_s", type=float, default=40.0, help="for replies to what may be no whole request")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    result = asyncio.run(main(_arguments()))
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(result["violations"]))

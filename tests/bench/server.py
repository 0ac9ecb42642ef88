"""A server of OpenAI's protocol whose times are known: each chunk goes out at a moment that the test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

Reply = Callable[[dict[str, Any], "Conversation"], Awaitable[None]]


class Conversation:
    """What a reply writes to.

    Args:
        writer: of the connection.
    """

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer

    async def head(self, status: str = "200 OK", *headers: str) -> None:
        """Status and headers of a chunked stream."""
        lines = [f"HTTP/1.1 {status}", "Content-Type: text/event-stream", *(headers or ["Transfer-Encoding: chunked"])]
        await self.raw("".join(line + "\r\n" for line in lines).encode() + b"\r\n")

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def data(self, data: bytes) -> None:
        """One HTTP chunk."""
        await self.raw(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def event(self, content: Any) -> None:
        """One event in one HTTP chunk."""
        text = content if isinstance(content, str) else json.dumps(content)
        await self.data(f"data: {text}\n\n".encode())

    async def end(self) -> None:
        await self.raw(b"0\r\n\r\n")


def usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def steady(first_s: float, gap_s: float) -> Reply:
    """`max_tokens` tokens, the first after `first_s`, then one each `gap_s`."""

    async def reply(body: dict[str, Any], say: Conversation) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time() + first_s
        await say.head()
        for i in range(body["max_tokens"]):
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            due_s += gap_s
            last = i == body["max_tokens"] - 1
            await say.event({"choices": [{"text": "a ", "finish_reason": "length" if last else None}]})
        prompt = body["prompt"]
        await say.event(usage(len(prompt) if isinstance(prompt, list) else len(prompt.split()), body["max_tokens"]))
        await say.event("[DONE]")
        await say.end()

    return reply


class Known:
    """A running server.

    Attributes:
        url: its address.
        bodies: of the requests, as they came.
        connections: that were opened.
    """

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.connections = 0
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                self.headers.append(headers)
                if head[0].startswith("GET /v1/models"):
                    told = json.dumps({"data": [{"id": "known"}]}).encode()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(told), told))
                    continue
                self.bodies.append(json.loads(body))
                await self.reply(self.bodies[-1], Conversation(writer))


@contextlib.contextmanager
def known(reply: Reply) -> Iterator[Known]:
    """The server, in a thread of its own."""
    server = Known(reply)
    loop = asyncio.new_event_loop()
    ready, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        ready.set()
        await stop.wait()
        listening.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)  # what they closed is gone

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()

"""`python -m tests.faults.disconnects --minutes 10 --clients 200`: every tenth client goes too soon; nothing leaks.

Memory and file descriptors are sampled; the medians of the second minute and of the last one are compared, once the
server has touched all of its cache. Exit status 1: one of them grew, a request failed, or blocks are in use when
nobody is there any more.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import signal
import statistics
import sys
import time
from typing import Any

from tests.faults.fronts import NAMES, Front, demo, start
from tests.faults.processes import num_fds, rss_mib
from tests.faults.strikes import until
from tests.faults.tables import quantile, table, write

_SAMPLE_S = 2.0
_END = b"0\r\n\r\n"
_RSS_GROWTH = 1.03  # of the medians; allocators keep what they once had
_FD_GROWTH = 8  # connections come and go
_OPTIONS = {"max_batch_size": 200, "num_kv_blocks": 2000, "max_num_batched_tokens": 512}


class Crowd:
    """Clients in one event loop.

    Args:
        front: to ask.
        share: of the clients go before their answer ends.

    Attributes:
        first_token_s: of each request that got one, with when it was sent.
        counts: of how requests ended.
    """

    def __init__(self, front: Front, share: float) -> None:
        self._front, self._share = front, share
        self.first_token_s: list[tuple[float, float]] = []
        self.counts: collections.Counter[str] = collections.Counter()

    async def run(self, clients: int, seconds: float) -> None:
        """Keeps so many clients asking for so long."""
        ends_s = time.monotonic() + seconds
        await asyncio.gather(*(self._client(random.Random(i), ends_s) for i in range(clients)))

    async def _client(self, rng: random.Random, ends_s: float) -> None:
        await asyncio.sleep(5 * rng.random())
        while time.monotonic() < ends_s:
            goes_after_s = 3 * rng.random() if rng.random() < self._share else None
            try:
                self.counts[await self._request(rng, goes_after_s)] += 1
            except OSError as e:
                self.counts[f"failed: {e!r}"] += 1
                await asyncio.sleep(0.2)

    async def _request(self, rng: random.Random, goes_after_s: float | None) -> str:
        body = json.dumps({
            "prompt": f"Once upon a time {rng.randrange(10**6)}", "max_new_tokens": rng.randint(8, 48),
            "temperature": 0.9, "seed": rng.randrange(2**32), "ignore_eos": True, "stream": rng.random() < 0.9,
        })  # fmt: skip
        path = f"{self._front.base}/{self._front.predictions}".rstrip("/")
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self._front.port)
        try:
            sent_s = time.monotonic()
            writer.write((head + body).encode())
            received = bytearray()
            async with asyncio.timeout(300 if goes_after_s is None else goes_after_s):
                while not self._whole(received):
                    data = await reader.read(1 << 16)
                    if not data:
                        break
                    if b'"ids"' not in received and b'"ids"' in data:
                        self.first_token_s.append((sent_s, time.monotonic() - sent_s))
                    received += data
        except TimeoutError:
            writer.transport.abort()
            return "went" if goes_after_s is not None else "failed: no end after 300 s"
        finally:
            writer.close()
        if not received.startswith(b"HTTP/1.1 200"):
            return f"failed: {bytes(received[:60])!r}"
        return "answered" if b'"length"' in received else f"failed: ends with {bytes(received[-100:])!r}"

    @staticmethod
    def _whole(received: bytearray) -> bool:
        head, blank, rest = received.partition(b"\r\n\r\n")
        if not blank:
            return False
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                return len(rest) >= int(line.partition(b":")[2])
        return rest.endswith(_END)


async def sampled(front: Front, crowd: Crowd, clients: int, seconds: float) -> list[tuple[float, dict[str, float]]]:
    """What was measured while the clients asked, with when."""
    group = front.serving
    assert group is not None
    watched = {"front": front.owner, "rank 0": group.ranks[0], "rank 1": group.ranks[1]}
    samples = []
    began_s = time.monotonic()
    asking = asyncio.create_task(crowd.run(clients, seconds))
    while not asking.done():
        await asyncio.wait([asking], timeout=_SAMPLE_S)
        one = {f"{name}, RSS in MiB": rss_mib(pid) for name, pid in watched.items()}
        one |= {f"{name}, open files": num_fds(pid) for name, pid in watched.items()}
        samples.append((time.monotonic() - began_s, one))
    await asking
    return samples


def figures_of(front: Front, minutes: float, clients: int, share: float) -> dict[str, Any]:
    """Runs it all; the server is ready."""
    crowd = Crowd(front, share)
    began_s = time.monotonic()
    samples = asyncio.run(sampled(front, crowd, clients, 60 * minutes))
    trouble = [f"{count} times {how}" for how, count in crowd.counts.items() if how.startswith("failed")]
    rows = []
    for name in samples[0][1]:
        second = statistics.median(one[name] for at_s, one in samples if 60 <= at_s < 120)
        last = statistics.median(one[name] for at_s, one in samples if 60 * (minutes - 1) <= at_s < 60 * minutes)
        rows.append({"what": name, "second_minute": round(second, 1), "last_minute": round(last, 1)})
        if last > (second * _RSS_GROWTH if "RSS" in name else second + _FD_GROWTH):
            trouble.append(f"{name}: {second:.1f} in the second minute, {last:.1f} in the last")
    try:
        until(lambda: set(front.blocks_in_use()) == {0}, "blocks to be given back", 30)
    except AssertionError as e:
        trouble.append(f"{e}: {front.blocks_in_use()}")
    first = [seconds for sent_s, seconds in crowd.first_token_s if sent_s - began_s > 60]
    return {
        "front": front.name,
        "minutes": minutes,
        "clients": clients,
        "ended": dict(crowd.counts),
        "blocks left": sum(front.blocks_in_use()),
        **{f"ttft_{name}_s": round(quantile(first, q), 2) for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))},
        "trouble": trouble,
        "rows": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.1, help="of the requests whose client goes")
    parser.add_argument("--front", choices=NAMES, default="serve")
    arguments = parser.parse_args()
    assert arguments.minutes >= 3, "the second minute is compared with the last one"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended
    with demo() as checkpoint:
        front = start(arguments.front, checkpoint, **_OPTIONS)
        try:
            front.wait_until_ready(180)
            until(lambda: front.standby, "a standby group")
            figures = figures_of(front, arguments.minutes, arguments.clients, arguments.share)
        finally:
            left = front.stop()
    figures["processes left"] = len(left)
    path = write(
        "disconnects" if arguments.front == "serve" else "disconnects-torchserve", "tests.faults.disconnects", figures
    )
    shown = {name: value for name, value in figures.items() if name != "rows"}
    rows = [list(row.values()) for row in figures["rows"]]
    text = table(("", "second minute", "last minute"), rows)
    sys.stdout.write(f"{json.dumps(shown, indent=1)}\n\n{text}\n\n{path}\n")
    return bool(figures["trouble"] or left)


if __name__ == "__main__":
    sys.exit(main())

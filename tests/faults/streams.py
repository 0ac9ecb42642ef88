"""Requests with fixed seeds, and what real HTTP clients were told: every token once, or what is wrong with it."""

from __future__ import annotations

import dataclasses
import functools
import http.client
import json
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.faults.fronts import Front

_OPENINGS = (
    "Once upon a time", "There was a king who", "In a deep forest", "The old woman said",
    "One morning the prince", "A poor miller", "The wolf came", "Long ago a fisherman",
)  # fmt: skip
_TIMEOUT_S = 300.0


@dataclasses.dataclass(frozen=True)
class Told:
    """A whole answer, as its client was told; two of the same request are equal, faults or not.

    Attributes:
        answers: for each one, its ids, text and finish reason.
        usage: what the server counted.
    """

    answers: tuple[tuple[tuple[int, ...], str, str], ...]
    usage: tuple[tuple[str, int], ...]


class WrongError(Exception):
    """An answer that cannot be right, whatever was asked for."""


def requests(count: int) -> list[dict[str, Any]]:
    """Of every kind: greedy and sampled, short and long prompts, several answers, in one piece, guided, searched."""
    made = []
    for i in range(count):
        body: dict[str, Any] = {
            "prompt": f"{_OPENINGS[i % 8]} {'and then ' * (i % 5)}", "max_new_tokens": 40 + (i * 37) % 120, "seed": i,
            "ignore_eos": True, "temperature": 0.0 if i % 4 == 0 else 0.7 + 0.1 * (i % 4),
        }  # fmt: skip
        match i % 12:
            case 1:
                body |= {"n": 2, "top_p": 0.95}
            case 3:
                body |= {"stream": False, "top_k": 20}
            case 5:
                body |= long_prompt(i)
            case 7:
                body |= {"repetition_penalty": 1.1, "logprobs": True}
            case 9:
                body |= {"guided_regex": "[a-z ]{30,60}", "ignore_eos": False}
            case 11:
                body |= {"beam_width": 3, "temperature": 0.0, "max_new_tokens": 24, "n": 1}
        made.append(body)
    return made


def long_prompt(seed: int) -> dict[str, Any]:
    """A prompt that takes a few hundred tokens and that no other request shares."""
    rng = random.Random(seed)
    return {"prompt": " ".join(rng.choice(_OPENINGS).lower() for _ in range(110))}


def ask(front: Front, body: dict[str, Any], on_line: Callable[[dict[str, Any]], None] | None = None) -> Told:
    """Sends one request and reads its answer line by line.

    Raises:
        WrongError: it was refused, it failed, or it was not told exactly once.
        OSError, http.client.HTTPException: the connection broke.
    """
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=_TIMEOUT_S)
    try:
        connection.request(
            "POST",
            f"{front.base}/{front.predictions}".rstrip("/"),
            json.dumps(body),
            {"Content-Type": "application/json"},
        )
        with connection.getresponse() as response:
            if response.status != 200:
                raise WrongError(f"status {response.status}: {response.read()[:500]!r}")
            lines = []
            while raw := response.readline():
                lines.append(json.loads(raw))
                if on_line is not None:
                    on_line(lines[-1])
    finally:
        connection.close()
    return _told(lines if body.get("stream", True) else _as_lines(lines))


def _as_lines(whole: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (one,) = whole
    choices = one.get("choices") or [one]
    return [{**choice, "index": i, "usage": one.get("usage")} for i, choice in enumerate(choices)]


def _told(lines: list[dict[str, Any]]) -> Told:
    ids: dict[int, list[int]] = {}
    text: dict[int, str] = {}
    ended: dict[int, str] = {}
    usage: dict[str, int] = {}
    for line in lines:
        index = line.get("index", 0)
        if index in ended:
            raise WrongError(f"a line after the last one: {line}")
        ids.setdefault(index, []).extend(line["ids"])
        text[index] = text.get(index, "") + line["text"]
        if "error" in line or line.get("finish_reason") == "error":
            raise WrongError(f"an error: {line}")
        if line.get("finish_reason") is not None:
            ended[index] = line["finish_reason"]
        usage = line.get("usage") or usage
    if not ended or ended.keys() != ids.keys():
        raise WrongError(f"no end after {sum(map(len, ids.values()))} tokens: {lines[-1:]}")
    if (total := sum(map(len, ids.values()))) != usage.get("completion_tokens"):
        raise WrongError(f"{total} tokens came, {usage} were counted")
    # How much the prefix cache had depends on who came before.
    counted = {name: n for name, n in usage.items() if isinstance(n, int) and "cached" not in name}
    return Told(
        tuple((tuple(ids[i]), text[i], ended[i]) for i in sorted(ids)), tuple(sorted(counted.items()))
    )  # fmt: skip


def undisturbed(front: Front, bodies: list[dict[str, Any]], threads: int = 8) -> list[Told]:
    """What a server says while nothing happens to it."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda body: ask(front, body), bodies))


class Clients:
    """Threads that ask again and again, and compare.

    Args:
        front: to ask.
        bodies: what for.
        expected: the answers.
        count: threads.

    Attributes:
        completions: whole answers that were right.
        tokens: of theirs.
        wrong: what was not.
        last_token_s: when any token came last, on the monotonic clock.
        heard_s: when each client was last told anything.
    """

    def __init__(self, front: Front, bodies: list[dict[str, Any]], expected: list[Told], count: int) -> None:
        self._front, self._bodies, self._expected = front, bodies, expected
        self.completions = self.tokens = 0
        self.wrong: list[str] = []
        self.last_token_s = time.monotonic()
        self.heard_s = [0.0] * count
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float = _TIMEOUT_S) -> int:
        """Lets every answer end; returns how many clients still hang."""
        self._stopping.set()
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return sum(thread.is_alive() for thread in self._threads)

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        while not self._stopping.is_set():
            which = rng.randrange(len(self._bodies))
            try:
                told = ask(self._front, self._bodies[which], functools.partial(self._heard, number))
                trouble = None if told == self._expected[which] else _difference(told, self._expected[which])
            except (WrongError, OSError, http.client.HTTPException, ValueError) as e:
                trouble, told = repr(e), None
            with self._lock:
                if trouble is None and told is not None:
                    self.completions += 1
                    self.tokens += sum(len(ids) for ids, _, _ in told.answers)
                else:
                    self.wrong.append(f"{time.strftime('%H:%M:%S')} request {which} ({self._bodies[which]}): {trouble}")
                    time.sleep(0.2)

    def _heard(self, number: int, line: dict[str, Any]) -> None:
        if line.get("ids"):
            self.last_token_s = self.heard_s[number] = time.monotonic()


def _difference(told: Told, expected: Told) -> str:
    for i, (one, other) in enumerate(zip(told.answers, expected.answers, strict=False)):
        if one != other:
            at = next((n for n, (a, b) in enumerate(zip(one[0], other[0], strict=False)) if a != b), None)
            said, wanted = (f"{len(ids)} tokens, {reason}" for ids, _, reason in (one, other))
            return f"answer {i} differs from token {at} on: {said}; expected {wanted}"
    return f"differs: {told.usage} instead of {expected.usage}, {len(told.answers)} answers"

"""Rank 0's source of requests in an offline batch: all of them at once, nobody waiting for any single one."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tpserve.engine.completion import Completion
from tpserve.engine.errors import RequestError
from tpserve.engine.protocol import Add, Cancel, Event, Outputs, Reply, Stop
from tpserve.engine.requests import GenerateRequest
from tpserve.engine.results import whole
from tpserve.engine.text.tokenizer import Tokenizer


def read_jsonl(path: Path) -> list[Any]:
    """The parsed lines of a JSONL file; a line that is not JSON becomes the RequestError that says so.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def parse(number: int, line: bytes) -> Any:
        try:
            value = json.loads(line)
        except ValueError as e:
            return RequestError(f"line {number} is not JSON: {e}")
        return value if isinstance(value, dict) else RequestError(f"line {number} is not a JSON object")

    lines = path.read_bytes().split(b"\n")
    return [parse(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def error_result(error: RequestError) -> dict[str, Any]:
    """The output line of a request that could not be served."""
    return {"error": {"message": str(error), "field": error.field}}


class OfflineFrontend:
    """Feeds requests to rank 0's loop and collects their tokens; a `Frontend`.

    Args:
        requests: (line number, request) in order.
        tokenizer: for the outputs' text; None: text is null.
        in_flight: requests that the scheduler is given at a time.
        on_result: takes a line's number and its output object.
    """

    def __init__(
        self,
        requests: list[tuple[int, GenerateRequest]],
        tokenizer: Tokenizer | None,
        in_flight: int,
        on_result: Callable[[int, dict[str, Any]], None],
    ) -> None:
        self._waiting = deque(requests)
        self._tokenizer = tokenizer
        self._in_flight = in_flight
        self._on_result = on_result
        self._running: dict[str, Completion] = {}
        self._deadlines_s: dict[str, float] = {}
        self._cancelled: list[Event] = []
        self._bar = tqdm(total=len(requests), unit="request", dynamic_ncols=True)
        self._tokens = 0

    def receive(self, timeout_s: float) -> list[Event]:
        """The next requests; `Stop` after the last one's end."""
        if self._deadlines_s:
            self._expire()
        events, self._cancelled = self._cancelled, []
        while self._waiting and len(self._running) < self._in_flight:
            events.append(self._start(*self._waiting.popleft()))
        return events if self._running else [*events, Stop()]

    def send_outputs(self, outputs: Outputs) -> None:
        """Collects tokens; hands over what is finished."""
        for output in outputs.outputs:
            completion = self._running.get(output.request_id)
            if completion is None:  # ended here, and the engine has not heard of it yet
                continue
            completion.add(output)
            self._tokens += len(output.token_ids)
            if completion.finished:
                self._finish(output.request_id)
        elapsed_s = self._bar.format_dict["elapsed"]
        self._bar.set_postfix_str(f"{self._tokens / max(elapsed_s, 1e-9):.0f} tokens/s", refresh=False)
        self._bar.update(0)

    def send(self, reply: Reply) -> None:
        """Heartbeats: nobody needs them here."""

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()

    def _start(self, index: int, request: GenerateRequest) -> Add:
        request_id = str(index)
        completion = Completion(
            request.prompt_token_ids,
            request.params,
            self._tokenizer,
            request.prompt_text,
            lambda choice: self._cancelled.append(Cancel(request_id, choice)),
        )
        self._running[request_id] = completion
        if request.timeout_s is not None:
            self._deadlines_s[request_id] = time.monotonic() + request.timeout_s
        return Add(request_id, request.prompt_token_ids, completion.params, priority=request.priority)

    def _expire(self) -> None:
        now_s = time.monotonic()
        for request_id in [name for name, deadline_s in self._deadlines_s.items() if deadline_s <= now_s]:
            self._cancelled.append(Cancel(request_id))
            self._running[request_id].end("timeout")
            self._finish(request_id)

    def _finish(self, request_id: str) -> None:
        completion = self._running.pop(request_id)
        self._deadlines_s.pop(request_id, None)
        result = whole(completion)
        if self._tokenizer is None:
            for answer in result.get("choices", [result]):
                answer["text"] = None
        self._on_result(int(request_id), result)
        self._bar.update(1)

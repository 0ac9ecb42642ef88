"""Rank 0's source of requests in an offline batch: all of them at once, nobody waiting for any single one."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tpserve.engine.errors import RequestError
from tpserve.engine.protocol import Add, Event, Reply, RequestOutput, Stop
from tpserve.engine.requests import GenerateRequest
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
        self._running: dict[str, tuple[GenerateRequest, list[int], list[float]]] = {}
        self._bar = tqdm(total=len(requests), unit="request", dynamic_ncols=True)
        self._tokens = 0

    def receive(self, timeout_s: float) -> list[Event]:
        """The next requests; `Stop` after the last one's end."""
        events: list[Event] = []
        while self._waiting and len(self._running) < self._in_flight:
            index, request = self._waiting.popleft()
            self._running[str(index)] = (request, [], [])
            events.append(Add(str(index), request.prompt_token_ids, request.params))
        return events if self._running else [Stop()]

    def send_outputs(self, outputs: list[RequestOutput]) -> None:
        """Collects tokens; hands over what is finished."""
        for output in outputs:
            request, ids, logprobs = self._running[output.request_id]
            ids += output.token_ids
            logprobs += output.logprobs or []
            self._tokens += len(output.token_ids)
            if output.finish_reason is not None:
                del self._running[output.request_id]
                self._finish(int(output.request_id), request, ids, logprobs, output.finish_reason)
        elapsed_s = self._bar.format_dict["elapsed"]
        self._bar.set_postfix_str(f"{self._tokens / max(elapsed_s, 1e-9):.0f} tokens/s", refresh=False)
        self._bar.update(0)

    def send(self, reply: Reply) -> None:
        """Heartbeats: nobody needs them here."""

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()

    def _finish(
        self, index: int, request: GenerateRequest, ids: list[int], logprobs: list[float], finish_reason: str
    ) -> None:
        n_prompt = len(request.prompt_token_ids)
        result: dict[str, Any] = {
            "text": None if self._tokenizer is None else self._tokenizer.decode(ids),
            "ids": ids,
            "finish_reason": finish_reason,
            "usage": {
                "prompt_tokens": n_prompt,
                "completion_tokens": len(ids),
                "total_tokens": n_prompt + len(ids),
            },
        }
        if request.params.logprobs:
            result["logprobs"] = logprobs
        self._on_result(index, result)
        self._bar.update(1)

"""Drives an EngineClient and collects what it delivers."""

from __future__ import annotations

import itertools
import threading
from typing import Any

from tpserve.engine.client import EngineClient
from tpserve.engine.protocol import RequestOutput
from tpserve.engine.sampling_params import SamplingParams

_numbers = itertools.count()


class Collected:
    """One request's outputs as they arrive.

    Attributes:
        ids, logprobs: all tokens so far.
        finish_reason, error: set with the last output.
        num_outputs: how many outputs they came in.
    """

    def __init__(self, client: EngineClient, prompt: list[int], **params: Any) -> None:
        self.request_id = f"test-{next(_numbers)}"
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.num_outputs = 0
        self._changed = threading.Condition()
        client.submit(self.request_id, prompt, SamplingParams(**params), self._take)

    def _take(self, output: RequestOutput) -> None:
        with self._changed:
            assert self.finish_reason is None, "an output after the last one"
            self.ids += output.token_ids
            self.logprobs += output.logprobs or []
            self.finish_reason, self.error = output.finish_reason, output.error
            self.num_outputs += 1
            self._changed.notify_all()

    def wait(self, timeout_s: float = 60.0) -> list[int]:
        """All tokens, once it has ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.finish_reason is not None, timeout_s), "timed out"
        return self.ids

    def wait_tokens(self, n: int, timeout_s: float = 60.0) -> None:
        """Until at least n tokens have come."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.ids) >= n, timeout_s), "timed out"

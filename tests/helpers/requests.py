"""Drives an EngineClient and collects what it delivers."""

from __future__ import annotations

import itertools
import threading
from typing import Any

from tpserve.engine.client import EngineClient
from tpserve.engine.in_flight import NewRequest
from tpserve.engine.protocol import PromptLogprob, RequestOutput, TopLogprobs
from tpserve.engine.sampling_params import SamplingParams

_numbers = itertools.count()


class Collected:
    """One request's outputs as they arrive.

    Args:
        client: started; None: `together` submits it.
        prompt: token ids.
        priority, timeout_s: see `EngineClient.submit`.
        params: sampling parameters.

    Attributes:
        answers: all tokens so far, by answer.
        ids, logprobs, top_logprobs: all tokens so far, of answer 0.
        finish_reasons, cumulative_logprobs: of the answers that have ended.
        prompt_logprobs, num_cached_tokens: as they came with the first output.
        error: set with the last output.
        num_outputs: how many outputs they came in.
    """

    def __init__(
        self,
        client: EngineClient | None,
        prompt: list[int],
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        **params: Any,
    ) -> None:
        self.request_id = f"test-{next(_numbers)}"
        self.params = SamplingParams(**params)
        self.answers: dict[int, list[int]] = {0: []}
        self.logprobs: list[float] = []
        self.top_logprobs: list[TopLogprobs] = []
        self.finish_reasons: dict[int, str] = {}
        self.cumulative_logprobs: dict[int, float | None] = {}
        self.prompt_logprobs: list[PromptLogprob | None] | None = None
        self.num_cached_tokens = 0
        self.error: str | None = None
        self.num_outputs = 0
        self._changed = threading.Condition()
        self._num_answers = self.params.n if self.params.beam_width > 1 else self.params.num_choices
        if client is not None:
            client.submit(self.request_id, prompt, self.params, self._take, priority=priority, timeout_s=timeout_s)

    @classmethod
    def together(cls, client: EngineClient, prompts: list[list[int]], **params: Any) -> list[Collected]:
        """Of requests that begin in one step, whoever else is there."""
        streams = [cls(None, prompt, **params) for prompt in prompts]
        client.submit_together(
            [NewRequest(s.request_id, prompt, s.params, s._take) for s, prompt in zip(streams, prompts, strict=True)]
        )
        return streams

    @property
    def ids(self) -> list[int]:
        return self.answers[0]

    @property
    def finish_reason(self) -> str | None:
        """Of answer 0."""
        return self.finish_reasons.get(0)

    def _take(self, output: RequestOutput) -> None:
        with self._changed:
            assert output.index not in self.finish_reasons, "an output after the last one"
            self.answers.setdefault(output.index, []).extend(output.token_ids)
            if output.index == 0:
                self.logprobs += output.logprobs or []
                self.top_logprobs += output.top_logprobs or []
                self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
                self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
            if output.finish_reason is not None:
                self.finish_reasons[output.index] = output.finish_reason
                self.cumulative_logprobs[output.index] = output.cumulative_logprob
            self.error = output.error
            self.num_outputs += 1
            self._changed.notify_all()

    def wait(self, timeout_s: float = 60.0) -> list[int]:
        """Answer 0's tokens, once all answers have ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.finish_reasons) == self._num_answers, timeout_s), "timed out"
        return self.ids

    def wait_tokens(self, n: int, timeout_s: float = 60.0) -> None:
        """Until at least n tokens of answer 0 have come."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.ids) >= n, timeout_s), "timed out"

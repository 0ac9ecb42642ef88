"""From the engine's outputs to what users get: text, stop strings, the best of several answers, the prompt's echo."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec

from tpserve.engine.answer import Answer, Delta
from tpserve.engine.protocol import PromptLogprob, RequestOutput
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.text.detokenizer import IncrementalDetokenizer
from tpserve.engine.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of one request.

    Attributes:
        prompt_tokens: counted once, however many answers there are.
        completion_tokens: of the answers that are returned.
        cached_tokens: of the prompt, that were in the prefix cache.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Completion:
    """All answers to one prompt. Belongs to one thread.

    Args:
        prompt_token_ids: the prompt.
        params: what the user asked for.
        tokenizer: None: ids only, text stays empty.
        prompt_text: for `echo`, if the prompt was text.
        cancel: called with the index of an answer that a stop string ended; the engine must be told.
        continues: the answer's text is what comes after the prompt's, a space between them included; otherwise it is
            a text of its own, whose first word has none. With `echo` it always continues.

    Attributes:
        params: what to ask the engine for: the user's, and log-probabilities that are needed here only.
        error: what happened, if an answer ended with finish_reason "error".
        prompt_logprobs: one a prompt token, None for the first, if they were asked for and have arrived.
    """

    def __init__(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        prompt_text: str | None = None,
        cancel: Callable[[int], None] = lambda index: None,
        continues: bool = False,
    ) -> None:
        self.params = _engine_params(params)
        self.error: str | None = None
        self.prompt_logprobs: list[PromptLogprob | None] | None = None
        self._num_prompt_tokens = len(prompt_token_ids)
        self._num_cached_tokens = 0
        self._cancel = cancel
        self._n = params.n
        self._beams = params.beam_width > 1
        # Which answers are the best is known when all have ended.
        self._chooses = not self._beams and params.num_choices > params.n
        detokenizer = None if tokenizer is None else IncrementalDetokenizer(tokenizer)
        echo = ""
        if (params.echo or continues) and detokenizer is not None:
            decoded = detokenizer.push(prompt_token_ids)
            if params.echo:
                echo = decoded if prompt_text is None else prompt_text
        num_answers = params.n if self._beams else params.num_choices
        self._answers = [
            Answer(i, params, None if detokenizer is None else detokenizer.copy(), echo) for i in range(num_answers)
        ]
        self._num_running = num_answers
        self._returned = self._answers
        self._news: set[int] = set()

    @property
    def finished(self) -> bool:
        """Whether all answers have ended."""
        return not self._num_running

    @property
    def finish_reasons(self) -> list[str | None]:
        """One an answer that is returned; None: it has not ended."""
        return [answer.finish_reason for answer in self._returned]

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        generated = sum(answer.num_tokens for answer in self._returned)
        return Usage(self._num_prompt_tokens, generated, self._num_cached_tokens)

    def add(self, output: RequestOutput) -> None:
        """Takes an output of the engine; those of an answer that has ended are passed over."""
        answer = self._answers[output.index]
        if answer.finished:
            return
        if output.num_cached_tokens:
            self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)
        if output.prompt_logprobs is not None and self.prompt_logprobs is None:
            self.prompt_logprobs = output.prompt_logprobs
        ended = answer.add(output)
        self._news.add(answer.index)
        if not ended:
            return
        self._num_running -= 1
        if output.finish_reason is None:
            self._cancel(answer.index)
        if output.finish_reason == "error":
            self.error = output.error or "the engine failed"
        if self._chooses and not self._num_running:
            self._choose()

    def end(self, finish_reason: str) -> None:
        """Ends every answer that has not ended."""
        for index, answer in enumerate(list(self._answers)):
            if not answer.finished:
                self.add(RequestOutput("", finish_reason=finish_reason, index=index))

    def take(self) -> list[Delta]:
        """What is new since the last call: one an answer that said something, in order of their indices."""
        if not self._news or (self._chooses and self._num_running):
            return []
        news, self._news = self._news, set()
        deltas = [answer.take() for answer in self._returned if answer.index in news]
        # What a stop string may begin in is withheld: then there is no news after all.
        return [delta for delta in deltas if delta.ids or delta.text or delta.finish_reason is not None]

    def _choose(self) -> None:
        # Python's sort is stable: equals stay in order of their indices.
        best = sorted(self._answers, key=lambda answer: -answer.mean_logprob)[: self._n]
        for index, answer in enumerate(best):
            answer.index = index
        self._returned = best
        self._news = set(range(self._n))


def _engine_params(params: SamplingParams) -> SamplingParams:
    changes: dict[str, int] = {}
    beams = params.beam_width > 1
    if params.logprobs is None and not beams and (params.cum_log_probs or params.num_choices > params.n):
        changes["logprobs"] = 0
    if params.echo and params.logprobs is not None and params.prompt_logprobs is None:
        changes["prompt_logprobs"] = params.logprobs
    return msgspec.structs.replace(params, **changes) if changes else params

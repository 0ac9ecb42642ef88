"""One answer of a request while it arrives: its text, where a stop string cuts it, and what has not been told yet."""

from __future__ import annotations

import dataclasses
from collections import deque

import msgspec

from tpserve.engine.protocol import RequestOutput, TopLogprobs
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.stop_strings import StopMatcher
from tpserve.engine.text.detokenizer import IncrementalDetokenizer


@dataclasses.dataclass(slots=True)
class Delta:
    """What one answer said since it was asked last.

    Attributes:
        index: which answer.
        text: ends with whole characters, and before anything that may become a stop string.
        ids: the tokens of that text; a token is told with its first visible character.
        logprobs, top_logprobs: one a token id, if the user asked for them.
        finish_reason: set in the answer's last one; see `RequestOutput`.
        cumulative_logprob: then too: of all its tokens, if the user asked for it or it is a hypothesis of beam search.
    """

    index: int
    text: str = ""
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] | None = None
    top_logprobs: list[TopLogprobs] | None = None
    finish_reason: str | None = None
    cumulative_logprob: float | None = None


class Answer:
    """See the module's text.

    With stop strings a token is reported when its text starts before the match: the last one may go beyond it.

    Args:
        index: which answer.
        params: what the user asked for.
        detokenizer: at the end of what the text goes on from; None: no text.
        text: that comes before the answer's own.

    Attributes:
        finish_reason: see `RequestOutput`; None: more will come.
        finished: it has one.
        num_tokens: reported so far.
    """

    def __init__(
        self, index: int, params: SamplingParams, detokenizer: IncrementalDetokenizer | None, text: str
    ) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.finished = False
        self.num_tokens = 0
        self._detokenizer = detokenizer
        self._withholder = _Withholder(params, detokenizer) if params.stop and detokenizer is not None else None
        self._logprobs = params.logprobs is not None
        self._tops = bool(params.logprobs)
        self._cumulative = params.cum_log_probs
        self._logprob_sum = 0.0
        self._texts = [text]
        self._delta = self._nothing()

    @property
    def mean_logprob(self) -> float:
        """Of the reported tokens; an answer without any is the worst."""
        return self._logprob_sum / self.num_tokens if self.num_tokens else -float("inf")

    def add(self, output: RequestOutput) -> bool:
        """Takes an output; whether it was the last. Not to be called after that."""
        if self._withholder is not None:
            text, output = self._withholder.filter(output)
            self._texts.append(text)
        elif self._detokenizer is not None:
            self._texts.append(self._detokenizer.push(output.token_ids))
            if output.finish_reason is not None:
                self._texts.append(self._detokenizer.finish())
        delta = self._delta
        delta.ids += output.token_ids
        self.num_tokens += len(output.token_ids)
        if output.logprobs is not None:
            self._logprob_sum += sum(output.logprobs)
            if delta.logprobs is not None:
                delta.logprobs += output.logprobs
            if delta.top_logprobs is not None:
                delta.top_logprobs += output.top_logprobs or []
        if output.finish_reason is not None:
            self.finished, self.finish_reason = True, output.finish_reason
            delta.finish_reason = output.finish_reason
            if output.cumulative_logprob is not None:
                delta.cumulative_logprob = output.cumulative_logprob
            elif self._cumulative:
                delta.cumulative_logprob = self._logprob_sum
        return self.finished

    def take(self) -> Delta:
        """What is new."""
        delta, self._delta = self._delta, self._nothing()
        delta.index = self.index
        delta.text = "".join(self._texts)
        self._texts.clear()
        return delta

    def _nothing(self) -> Delta:
        return Delta(self.index, logprobs=[] if self._logprobs else None, top_logprobs=[] if self._tops else None)


class _Withholder:
    """Keeps back text that is, or may become, a stop string, and the tokens that have no other text."""

    def __init__(self, params: SamplingParams, detokenizer: IncrementalDetokenizer) -> None:
        self._matcher = StopMatcher(params.stop)
        self._detokenizer = detokenizer
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._text = ""
        self._text_start = 0  # characters before `_text` have been told
        # (where its text starts, its id, its log-probability, the most probable ones')
        self._tokens: deque[tuple[int, int, float | None, TopLogprobs | None]] = deque()

    def filter(self, output: RequestOutput) -> tuple[str, RequestOutput]:
        """The text that may be told now, and the output with its tokens only; a match is the end."""
        matcher, finish_reason = self._matcher, output.finish_reason
        matched = False
        for i, token_id in enumerate(output.token_ids):
            self._num_tokens += 1
            logprob = None if output.logprobs is None else output.logprobs[i]
            top = None if output.top_logprobs is None else output.top_logprobs[i]
            self._tokens.append((matcher.num_chars, token_id, logprob, top))
            matched = self._push(self._detokenizer.push((token_id,)))
            if matched:
                break
        if finish_reason is not None and not matched:
            matched = self._push(self._detokenizer.finish())
        if matched:
            finish_reason = "stop"
        whole = finish_reason is not None and not matched
        end = matcher.num_chars if whole else matcher.num_safe_chars
        text, self._text = self._text[: end - self._text_start], self._text[end - self._text_start :]
        self._text_start = end
        told = []
        while self._tokens and (whole or self._tokens[0][0] < end):
            told.append(self._tokens.popleft())
        return text, msgspec.structs.replace(
            output,
            token_ids=[token_id for _, token_id, _, _ in told],
            logprobs=[logprob for _, _, logprob, _ in told if logprob is not None],
            top_logprobs=[top for _, _, _, top in told if top is not None],
            finish_reason=finish_reason,
        )

    def _push(self, text: str) -> bool:
        self._text += text
        return bool(text) and self._matcher.push(text, counts=self._num_tokens > self._min_tokens)

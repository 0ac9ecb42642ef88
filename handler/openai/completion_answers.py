"""Text completions: text that continues the prompt, or follows its echo."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tpserve.engine.answer import Delta
from tpserve.engine.completion import Completion
from tpserve.engine.text.detokenizer import IncrementalDetokenizer
from tpserve.engine.text.tokenizer import Tokenizer
from tpserve.handler.http import Signal
from tpserve.handler.open_request import Input
from tpserve.handler.openai.answers import Head, OpenAIAnswers, with_sum
from tpserve.handler.openai.logprobs import CompletionLogprobs, TokenTexts, joined, prompt_logprobs


@dataclasses.dataclass(frozen=True)
class CompletionForm:
    """What a text completion shows.

    Attributes:
        inputs: the prompts.
        echo: the prompt before the text.
        drop: what was generated is not shown: the client asked for no token, and the engine makes at least one.
        num_logprobs: so many most probable tokens beside each; None: no log-probabilities.
        num_prompt_logprobs: the same for `prompt_logprobs`.
    """

    inputs: Sequence[Input]
    echo: bool = False
    drop: bool = False
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None


class CompletionAnswers(OpenAIAnswers):
    """See the module's text.

    Args:
        form: what is shown.
        tokenizer: of the model; see `OpenAIAnswers` for the others.
    """

    def __init__(
        self,
        head: Head,
        form: CompletionForm,
        tokenizer: Tokenizer,
        engine_ids: tuple[str, ...],
        completions: list[Completion],
        signal: Signal,
    ) -> None:
        super().__init__(head, engine_ids, completions, signal)
        self._form = form
        self._tokenizer = tokenizer
        self._texts = TokenTexts(tokenizer)
        self._logprobs: dict[int, CompletionLogprobs] = {}  # by choice
        self._begun_choices: set[int] = set()

    def ready(self, prompt: int) -> bool:
        """The prompt's own log-probabilities stand first; they come with its first answer."""
        waits = self._form.echo and self._form.num_logprobs is not None
        return not waits or self.completions[prompt].prompt_logprobs is not None

    def choices(self, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        """One chunk."""
        return [self._choice(prompt, delta)]

    def choice(self, prompt: int, delta: Delta) -> dict[str, Any]:
        """The same, with all the answer in one delta."""
        choice = self._choice(prompt, delta)
        scored = self.completions[prompt].prompt_logprobs
        if self._form.num_prompt_logprobs is not None and scored is not None:
            ids = self._form.inputs[prompt].token_ids
            choice["prompt_logprobs"] = prompt_logprobs(self._texts, ids, scored, self._form.num_prompt_logprobs)
        return choice

    def num_completion_tokens(self) -> int:
        """None, where none was asked for."""
        return 0 if self._form.drop else super().num_completion_tokens()

    def _choice(self, prompt: int, delta: Delta) -> dict[str, Any]:
        form, index = self._form, self.index(prompt, delta)
        if form.drop:
            finish_reason = None if delta.finish_reason is None else "length"
            delta = Delta(delta.index, logprobs=[], finish_reason=finish_reason)
        text = delta.text
        begins = index not in self._begun_choices
        echo = self._echo(prompt) if begins and form.echo else ""
        self._begun_choices.add(index)
        logprobs = None
        if form.num_logprobs is not None:
            logprobs = self._told(prompt, index, delta, echo if begins and form.echo else None, form.num_logprobs)
        choice = {"index": index, "text": echo + text, "logprobs": logprobs, "finish_reason": delta.finish_reason}
        return with_sum(choice, delta)

    def _told(self, prompt: int, index: int, delta: Delta, echo: str | None, num_tops: int) -> dict[str, Any]:
        one = self._form.inputs[prompt]
        if index not in self._logprobs:
            self._logprobs[index] = CompletionLogprobs(
                self._texts, self._tokenizer, one.token_ids, self._form.echo, one.continues
            )
        logprobs = self._logprobs[index]
        if echo is None:
            return logprobs.said(delta)
        before = logprobs.prompt(self.completions[prompt].prompt_logprobs or [], num_tops, echo)
        return joined(before, logprobs.said(delta))

    def _echo(self, prompt: int) -> str:
        one = self._form.inputs[prompt]
        return IncrementalDetokenizer(self._tokenizer).push(one.token_ids) if one.text is None else one.text

"""Chat completions: messages, and calls of tools."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tpserve.engine.answer import Delta
from tpserve.engine.completion import Completion
from tpserve.engine.text.tokenizer import Tokenizer
from tpserve.handler.http import Signal
from tpserve.handler.openai.answers import Head, OpenAIAnswers, with_sum
from tpserve.handler.openai.logprobs import TokenTexts, chat_logprobs, prompt_logprobs
from tpserve.handler.openai.tools import Call, Tools


@dataclasses.dataclass(frozen=True)
class ChatForm:
    """What a chat completion shows.

    Attributes:
        prompt_ids: what the engine goes on from.
        tools: that may be called.
        logprobs: of the answers' tokens.
        num_prompt_logprobs: so many most probable tokens beside each of the prompt; None: nothing of the prompt.
    """

    prompt_ids: Sequence[int]
    tools: Tools
    logprobs: bool = False
    num_prompt_logprobs: int | None = None


@dataclasses.dataclass
class _Progress:
    """One answer in a stream.

    Attributes:
        begun: its role has been told.
        open: it is text, whatever comes.
        held: text that may still become a call.
        logprobs: of tokens whose text is held.
        num_tokens: so far.
    """

    begun: bool = False
    open: bool = False
    held: str = ""
    logprobs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    num_tokens: int = 0


class ChatAnswers(OpenAIAnswers):
    """See the module's text. A call is told when it is complete: only then is it known to be one.

    Args:
        form: what is shown.
        tokenizer: of the model; see `OpenAIAnswers` for the others.
    """

    def __init__(
        self,
        head: Head,
        form: ChatForm,
        tokenizer: Tokenizer,
        engine_ids: tuple[str, ...],
        completions: list[Completion],
        signal: Signal,
    ) -> None:
        super().__init__(head, engine_ids, completions, signal)
        self._form = form
        self._texts = TokenTexts(tokenizer)
        self._progress = [_Progress(open=not form.tools.functions) for _ in range(head.n)]

    def choices(self, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        """The role first, then text as it comes, or calls at the end."""
        index = self.index(prompt, delta)
        state = self._progress[index]
        out = []
        if not state.begun:
            state.begun = True
            out.append(self._chunk_choice(index, {"role": "assistant", "content": ""}))
        if self._form.logprobs:
            state.logprobs += chat_logprobs(self._texts, delta, state.num_tokens == 0)
            state.num_tokens += len(delta.ids)
        state.held += delta.text
        begin = state.held.lstrip()[:1]
        state.open = state.open or (not self._form.tools.forced and begin not in ("", "{", "["))
        if not state.open and delta.finish_reason is None:
            return out
        content, finish_reason = state.held, delta.finish_reason
        calls: list[Call] = []
        if not state.open:
            content, calls, finish_reason = self._read(state.held, delta.finish_reason)
        state.held = ""
        said: dict[str, Any] = {"content": content} if content else {}
        if calls:
            said["tool_calls"] = [{"index": i, **call.as_json()} for i, call in enumerate(calls)]
        if said or state.logprobs or finish_reason is not None:
            choice = self._chunk_choice(index, said, finish_reason)
            if self._form.logprobs:
                choice["logprobs"] = {"content": state.logprobs, "refusal": None}
                state.logprobs = []
            out.append(with_sum(choice, delta))
        return out

    def choice(self, prompt: int, delta: Delta) -> dict[str, Any]:
        """A message."""
        content, calls, finish_reason = self._read(delta.text, delta.finish_reason)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": None, "tool_calls": [call.as_json() for call in calls]}
        logprobs = None
        if self._form.logprobs:
            logprobs = {"content": chat_logprobs(self._texts, delta, True), "refusal": None}
        choice = {"index": delta.index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}
        return with_sum(choice, delta)

    def more_of_whole(self) -> dict[str, Any]:
        """The prompt's log-probabilities, if they were asked for."""
        scored, num_tops = self.completions[0].prompt_logprobs, self._form.num_prompt_logprobs
        if num_tops is None or scored is None:
            return {}
        return {"prompt_logprobs": prompt_logprobs(self._texts, self._form.prompt_ids, scored, num_tops)}

    def _read(self, text: str, finish_reason: str | None) -> tuple[str, list[Call], str | None]:
        """A whole answer's text or calls, and why it ended. A call that was cut off keeps its own reason."""
        calls = self._form.tools.calls(text)
        if not calls:
            return text, [], finish_reason
        return "", calls, "tool_calls" if calls[0].complete else finish_reason

    def _chunk_choice(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

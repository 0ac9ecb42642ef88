"""`v1/completions`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from tpserve.engine import fields
from tpserve.engine.errors import RequestError
from tpserve.engine.limits import MAX_PROMPTS, at_most
from tpserve.engine.requests import Prompt, read_urgency
from tpserve.handler.http import HttpRequest, Signal
from tpserve.handler.open_request import Input
from tpserve.handler.openai.body import read_body
from tpserve.handler.openai.completion_answers import CompletionAnswers, CompletionForm
from tpserve.handler.openai.completion_schema import CompletionRequest
from tpserve.handler.openai.endpoint import answered, head_of
from tpserve.handler.openai.params import check_stream, read_params

if TYPE_CHECKING:
    from tpserve.handler.backend import Backend

_MAX_TOKENS = 16  # OpenAI's default


@answered
def completions(
    backend: Backend, request_id: str, request: HttpRequest, signal: Signal, stream: bool
) -> CompletionAnswers:
    """Starts a text completion."""
    asked, given = read_body(request, CompletionRequest, backend.model_name)
    check_stream(asked)
    tokenizer = backend.tokenizer
    if tokenizer is None:
        raise RequestError("this model has no tokenizer, and so no text: use the predictions API", field="prompt")
    own: dict[str, Any] = {name: given[name] for name in ("max_tokens", "logprobs") if name in given}
    drop = own.get("max_tokens") == 0
    if drop:
        own["max_tokens"] = 1
    params = read_params(backend, given, own, _MAX_TOKENS, None)
    echo, num_tops, num_prompt_tops = asked.echo is True, params.logprobs, params.prompt_logprobs
    if drop:  # what is thrown away need not be good
        params = msgspec.structs.replace(params, logprobs=None, best_of=None)
    if echo and num_tops is not None:
        params = msgspec.structs.replace(params, prompt_logprobs=max(num_tops, num_prompt_tops or 0))
        if params.max_new_tokens == 1:
            # lm-eval asks so, and takes the list's last token off as the answer's: where the answer ends at once, that
            # would be one of the prompt's, and the score too good. So the end is told as a token.
            params = msgspec.structs.replace(params, ignore_eos=True)
    inputs = [
        Input(
            backend.reader.encode(prompt),
            params,
            prompt.value if isinstance(prompt.value, str) else None,
            # What guides an answer describes all of it, without a space before its first word.
            continues=params.guided is None,
        )
        for prompt in read_prompts(given.get("prompt"))
    ]
    form = CompletionForm(inputs, echo, drop, num_tops, num_prompt_tops)
    priority, timeout_s = read_urgency(given)
    head = head_of(backend, f"cmpl-{request_id}", asked, params.n, stream)
    return backend.submit(
        request_id,
        inputs,
        lambda engine_ids, completions: CompletionAnswers(head, form, tokenizer, engine_ids, completions, signal),
        priority,
        timeout_s,
    )


def read_prompts(value: Any) -> list[Prompt]:
    """The prompts of `prompt`: text, token ids, or a list of either.

    Raises:
        RequestError: it is none of them; names the place.
    """
    if isinstance(value, str):
        return [Prompt("prompt", fields.string("prompt", value))]
    if not isinstance(value, list) or not value:
        raise RequestError(
            f"prompt must be text, token ids, or a list of either, got {fields.shown(value)}", field="prompt"
        )
    if isinstance(value[0], int):
        return [Prompt("prompt", fields.token_ids("prompt", value))]
    at_most("prompt", len(value), MAX_PROMPTS)
    return [_entry(f"prompt[{i}]", one) for i, one in enumerate(value)]


def _entry(where: str, value: Any) -> Prompt:
    if isinstance(value, str):
        return Prompt(where, fields.string(where, value))
    if not isinstance(value, list) or not value:
        raise RequestError(f"{where} must be text or token ids, got {fields.shown(value)}", field=where)
    return Prompt(where, fields.token_ids(where, value))

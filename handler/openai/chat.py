"""`v1/chat/completions`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tpserve.engine.errors import RequestError
from tpserve.engine.fields import check_unicode
from tpserve.engine.requests import read_urgency
from tpserve.handler.http import HttpRequest, Signal
from tpserve.handler.open_request import Input
from tpserve.handler.openai.body import read_body
from tpserve.handler.openai.chat_answers import ChatAnswers, ChatForm
from tpserve.handler.openai.chat_prompt import encode_messages
from tpserve.handler.openai.chat_schema import ChatRequest, ResponseFormat
from tpserve.handler.openai.endpoint import answered, head_of
from tpserve.handler.openai.params import check_stream, read_params
from tpserve.handler.openai.tools import Tools

if TYPE_CHECKING:
    from tpserve.handler.backend import Backend

_UNSERVED = {"functions": "send tools", "function_call": "send tool_choice", "audio": "answers are text"}


@answered
def chat_completions(
    backend: Backend, request_id: str, request: HttpRequest, signal: Signal, stream: bool
) -> ChatAnswers:
    """Starts a chat completion."""
    asked, given = read_body(request, ChatRequest, backend.model_name)
    for name, instead in _UNSERVED.items():
        if name in given:
            raise RequestError(f"{name} is not served: {instead}", field=name)
    check_stream(asked)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", field="top_logprobs")
    tools = Tools.of(asked)
    own: dict[str, Any] = {name: given[name] for name in ("max_tokens", "max_completion_tokens") if name in given}
    if asked.logprobs:
        own["logprobs"] = asked.top_logprobs or 0
    schema = tools.schema(_answer_schema(asked.response_format))
    guided_by: str | None = None
    if schema is not None:
        own["guided_json"] = schema
        guided_by = "tools" if tools.forced else "response_format"
    # The context's end stops an answer whose length nobody limits.
    params = read_params(backend, given, own, backend.reader.max_seq_len, guided_by)
    priority, timeout_s = read_urgency(given)
    told = tools.prompt()
    check_unicode("tools", told or "")
    ids = encode_messages(backend, asked.messages, told)
    head = head_of(backend, f"chatcmpl-{request_id}", asked, params.n, stream)
    form = ChatForm(ids, tools, bool(asked.logprobs), params.prompt_logprobs)
    tokenizer = backend.tokenizer
    assert tokenizer is not None, "there were no messages without one"
    return backend.submit(
        request_id,
        [Input(ids, params)],
        lambda engine_ids, completions: ChatAnswers(head, form, tokenizer, engine_ids, completions, signal),
        priority,
        timeout_s,
    )


def _answer_schema(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """The JSON schema of an answer; None: any text."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        raise RequestError("response_format.json_schema is missing", field="response_format.json_schema")
    return {"type": "object"} if wanted.json_schema.schema_ is None else wanted.json_schema.schema_

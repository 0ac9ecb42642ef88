"""What needs no engine: models, tokens of a text and back, the version, and the OpenAPI document."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

from tpserve.engine import fields
from tpserve.engine.errors import RequestError
from tpserve.engine.requests import Prompt
from tpserve.engine.text.tokenizer import Tokenizer
from tpserve.handler.http import HttpRequest, Signal
from tpserve.handler.openai.body import read_body
from tpserve.handler.openai.chat_prompt import encode_messages
from tpserve.handler.openai.completion_schema import DetokenizeRequest, TokenizeRequest
from tpserve.handler.openai.endpoint import answered
from tpserve.handler.openai.errors import ModelNotFoundError
from tpserve.handler.openai.logprobs import TokenTexts
from tpserve.handler.openai.openapi import openapi
from tpserve.handler.replies import Reply, json_reply

if TYPE_CHECKING:
    from tpserve.handler.backend import Backend


@answered
def models(backend: Backend, request_id: str, request: HttpRequest, signal: Signal, stream: bool) -> Reply:
    """The one model; below `v1/models/` it goes by its id."""
    name = request.path.removeprefix("v1/models").strip("/")
    if name and name != backend.model_name:
        raise ModelNotFoundError(fields.shown(name).strip("'\""), backend.model_name)
    model = {
        "id": backend.model_name,
        "object": "model",
        "created": backend.started_s,
        "owned_by": "tpserve",
        "max_model_len": backend.reader.max_seq_len,
    }
    return json_reply(model if name else {"object": "list", "data": [model]})


@answered
def tokenize(backend: Backend, request_id: str, request: HttpRequest, signal: Signal, stream: bool) -> Reply:
    """Token ids of a prompt or of messages, as a completion would see them; too many are refused as there."""
    asked, _ = read_body(request, TokenizeRequest, backend.model_name)
    tokenizer = _tokenizer(backend, "prompt")
    if (asked.prompt is None) == (asked.messages is None):
        raise RequestError("send either prompt or messages", field="prompt")
    if asked.messages is not None:
        ids = encode_messages(backend, asked.messages)
    else:
        ids = backend.reader.encode(Prompt("prompt", fields.string("prompt", asked.prompt)))
        if asked.add_special_tokens is False:
            ids = ids[1:]  # all but the beginning of the sequence
    reply: dict[str, Any] = {"count": len(ids), "max_model_len": backend.reader.max_seq_len, "tokens": ids}
    if asked.return_token_strs:
        texts = TokenTexts(tokenizer)
        reply["token_strs"] = [texts.text(token_id) for token_id in ids]
    return json_reply(reply)


@answered
def detokenize(backend: Backend, request_id: str, request: HttpRequest, signal: Signal, stream: bool) -> Reply:
    """Text of token ids; control tokens have none."""
    asked, _ = read_body(request, DetokenizeRequest, backend.model_name)
    tokenizer = _tokenizer(backend, "tokens")
    ids = fields.token_ids("tokens", asked.tokens)
    for i, token_id in enumerate(ids):
        if token_id >= tokenizer.vocab_size:
            said = f"tokens[{i}] is {token_id}, outside the vocabulary of {tokenizer.vocab_size}"
            raise RequestError(said, field="tokens")
    return json_reply({"prompt": tokenizer.decode(ids)})


@answered
def version(backend: Backend, request_id: str, request: HttpRequest, signal: Signal, stream: bool) -> Reply:
    """Of this package."""
    return json_reply({"version": importlib.metadata.version("tpserve")})


@answered
def document(backend: Backend, request_id: str, request: HttpRequest, signal: Signal, stream: bool) -> Reply:
    """What `openapi` says."""
    return json_reply(openapi())


@answered
def unknown(backend: Backend, request_id: str, request: HttpRequest, signal: Signal, stream: bool) -> Reply:
    """Whatever else OpenAI has."""
    raise RequestError(f"there is nothing at {fields.shown(request.path)}", status=404)


def _tokenizer(backend: Backend, field: str) -> Tokenizer:
    if backend.tokenizer is None:
        raise RequestError("this model has no tokenizer", field=field)
    return backend.tokenizer

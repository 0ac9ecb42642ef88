"""The OpenAPI document of this protocol, made from the schemas that requests are checked with."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from typing import Any

import pydantic
from pydantic.json_schema import models_json_schema

from tpserve.handler.openai import reply_schema as replies
from tpserve.handler.openai.chat_schema import ChatRequest
from tpserve.handler.openai.completion_schema import CompletionRequest, DetokenizeRequest, TokenizeRequest

_REF = "#/components/schemas/{model}"
_ERRORS = {
    "400": "the request cannot be served; `param` names the field",
    "401": "the server asks for a key, and this is none",
    "404": "another model, or another path",
    "408": "the body did not come in time",
    "413": "the body has too many bytes",
    "415": "the body is compressed",
    "429": "too many requests; the header Retry-After says when to try again",
    "503": "the engine cannot make tokens, or the server takes no more requests",
}


@dataclasses.dataclass(frozen=True)
class _Operation:
    """One path and its one method."""

    path: str
    summary: str
    reply: type[pydantic.BaseModel]
    request: type[pydantic.BaseModel] | None = None
    chunk: type[pydantic.BaseModel] | None = None
    errors: tuple[str, ...] = ()


_ANY = ("401", "503")  # a front's, whatever is asked for
_POSTED = ("400", "404", "408", "413", "415")
_GENERATING = (*_POSTED, "429")
_OPERATIONS = (
    _Operation("/v1/chat/completions", "Answer a chat", replies.ChatCompletion, ChatRequest, replies.ChatChunk,
               _GENERATING),
    _Operation("/v1/completions", "Continue a text", replies.Completion, CompletionRequest, replies.Completion,
               _GENERATING),
    _Operation("/v1/models", "The served models", replies.ModelList),
    _Operation("/v1/models/{model}", "One of them", replies.Model, errors=("404",)),
    _Operation("/tokenize", "Token ids of a prompt or of messages", replies.Tokens, TokenizeRequest,
               errors=_POSTED),
    _Operation("/detokenize", "Text of token ids", replies.Text, DetokenizeRequest, errors=_POSTED),
    _Operation("/version", "The server's version", replies.Version),
)  # fmt: skip


@functools.cache
def openapi() -> dict[str, Any]:
    """OpenAPI 3.1; paths are relative to the document's own place, wherever a front puts it. Not to be changed."""
    requests = {operation.request for operation in _OPERATIONS} - {None}
    answers = {model for operation in _OPERATIONS for model in (operation.reply, operation.chunk)} - {None}
    ordered = sorted({*requests, *answers, replies.ErrorReply}, key=lambda model: str(model and model.__name__))
    modes = [(model, "validation") for model in ordered if model is not None]
    _, definitions = models_json_schema(modes, ref_template=_REF)  # type: ignore[arg-type]
    return {
        "openapi": "3.1.0",
        "info": {"title": "tpserve", "version": importlib.metadata.version("tpserve")},
        "servers": [{"url": "."}],
        "paths": {
            **{one.path: {"post" if one.request else "get": _operation(one)} for one in _OPERATIONS},
            "/openapi.json": {
                "get": {
                    "summary": "This document",
                    "operationId": "openapi_json",
                    "responses": {"200": _content("the document", {"application/json": {"type": "object"}})}
                    | _errors(),
                }
            },
        },
        # A key or none: the document cannot know what its server asks for.
        "security": [{}, {"key": []}],
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(one: _Operation) -> dict[str, Any]:
    told: dict[str, Any] = {"summary": one.summary, "operationId": one.path.strip("/{}").replace("/", "_")}
    if "{model}" in one.path:
        told["operationId"] = "v1_models_one"
        told["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if one.request is not None:
        told["requestBody"] = {"required": True} | _json_of(one.request)
    ok: dict[str, Any] = {"application/json": _ref(one.reply)}
    said = "the reply"
    if one.chunk is not None:
        said += "; with `stream: true` server-sent events, whose data are chunks, perhaps an error, then `[DONE]`"
        ok["text/event-stream"] = {"type": "string", "x-event-data": _ref(one.chunk)}
    told["responses"] = {"200": _content(said, ok)} | _errors(*one.errors)
    return told


def _errors(*own: str) -> dict[str, Any]:
    return {status: {"description": _ERRORS[status]} | _json_of(replies.ErrorReply) for status in sorted({*_ANY, *own})}


def _content(description: str, schemas: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {kind: {"schema": schema} for kind, schema in schemas.items()}}


def _json_of(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": _ref(model)}}}


def _ref(model: type[pydantic.BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}

"""Triton's paths: which there are, and what each does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpserve.engine.errors import RequestError, TpserveError
from tpserve.handler.http import HttpRequest, Signal
from tpserve.handler.open_request import Pending
from tpserve.handler.replies import Reply, json_reply
from tpserve.handler.triton.errors import triton_error
from tpserve.handler.triton.generate import generate
from tpserve.handler.triton.infer import MAX_BATCH_SIZE, read_infer
from tpserve.handler.triton.infer_answers import Inferred
from tpserve.handler.triton.model import VERSION, check_model, model_config, model_metadata, server_metadata

if TYPE_CHECKING:
    from tpserve.handler.backend import Backend


def server(backend: Backend, request_id: str, request: HttpRequest, signal: Signal, stream: bool) -> Reply:
    """`v2`: who we are."""
    return json_reply(server_metadata())


def live(backend: Backend, request_id: str, request: HttpRequest, signal: Signal, stream: bool) -> Reply:
    """`v2/health/live`: whoever answers is."""
    return Reply(b"")


def ready(backend: Backend, request_id: str, request: HttpRequest, signal: Signal, stream: bool) -> Pending | Reply:
    """`v2/health/ready`: 503 with the reason while no tokens can be made."""
    return backend.health.ask(signal, bare=True)


def models(backend: Backend, request_id: str, request: HttpRequest, signal: Signal, stream: bool) -> Pending | Reply:
    """`v2/models/{m}`, with or without `/versions/1`, and what is below."""
    try:
        return _model(backend, request_id, request, signal, stream)
    except TpserveError as e:
        return triton_error(e)


def _model(backend: Backend, request_id: str, request: HttpRequest, signal: Signal, stream: bool) -> Pending | Reply:
    name, *below = request.path.removeprefix("v2/models/").split("/")
    version = VERSION
    if len(below) > 1 and below[0] == "versions":
        version, *below = below[1:]
    check_model(name, version, backend)
    match below:
        case []:
            return json_reply(model_metadata(name))
        case ["ready"]:
            return ready(backend, request_id, request, signal, stream)
        case ["config"]:
            return json_reply(model_config(name, MAX_BATCH_SIZE))
        case ["generate"]:
            return generate(backend, request_id, request, signal, name, events=False, stream=stream)
        case ["generate_stream"]:
            return generate(backend, request_id, request, signal, name, events=True, stream=stream)
        case ["infer"]:
            asked = read_infer(request, backend)
            return backend.submit(
                request_id,
                [row.input for row in asked.rows],
                lambda ids, completions: Inferred(ids, completions, signal, asked, name, backend.tokenizer is not None),
                asked.rows[0].priority,
                asked.rows[0].timeout_s,
            )
    known = "config, generate, generate_stream, infer, ready"
    raise RequestError(f"there is nothing at {request.path!a}; of a model there are {known}", "path", 404)

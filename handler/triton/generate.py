"""Triton's generate extension: one prompt, the answer as one JSON object or as server-sent events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tpserve.engine import fields
from tpserve.engine.answer import Delta
from tpserve.engine.completion import Completion
from tpserve.engine.errors import EngineError, RequestError
from tpserve.handler.http import HttpRequest, Signal
from tpserve.handler.open_request import OpenAnswers
from tpserve.handler.predictions import decode, parse_json, readable_body
from tpserve.handler.replies import Reply, json_line, json_reply
from tpserve.handler.triton.errors import error_text, triton_error
from tpserve.handler.triton.fields import Inference, read_inference, unwrap
from tpserve.handler.triton.model import VERSION

if TYPE_CHECKING:
    from tpserve.handler.backend import Backend

SSE = "text/event-stream"


def generate(
    backend: Backend, request_id: str, request: HttpRequest, signal: Signal, model: str, events: bool, stream: bool
) -> OpenAnswers:
    """Starts a request to `…/generate`, or with `events` one to `…/generate_stream`.

    Args:
        model: as it was called.
        stream: whether streams are possible; without, there is one event.

    Raises:
        RequestError: names the field.
    """
    given = read_object(request)
    name = given.pop("id", None)
    about = {} if name is None else {"id": name if isinstance(name, int) else fields.string("id", name)}
    wanted = unwrap("stream", given.pop("stream", events))
    if fields.boolean("stream", events if wanted is None else wanted) and not events:
        raise RequestError("stream: generate answers as a whole; streams are had from generate_stream", field="stream")
    inference = read_inference(given, backend)
    about |= {"model_name": model, "model_version": VERSION}
    return backend.submit(
        request_id,
        [inference.input],
        lambda ids, completions: _Generated(
            ids, completions, signal, about, inference, events, stream and wanted is not False
        ),
        inference.priority,
        inference.timeout_s,
    )


def read_object(request: HttpRequest) -> dict[str, Any]:
    """A body's fields; those of `parameters` stand beside the others.

    Raises:
        RequestError: it is no JSON object.
    """
    body = readable_body(request)
    if isinstance(body, bytes | bytearray | memoryview):
        body = decode(bytes(body))
    if isinstance(body, str):
        body = parse_json(body)
    if not isinstance(body, Mapping):
        raise RequestError(f"the body must be a JSON object with text_input, got {fields.shown(body)}", "text_input")
    given = dict(body)
    parameters = given.pop("parameters", None)
    if parameters is None:
        return given
    if not isinstance(parameters, Mapping):
        raise RequestError(f"parameters must be an object, got {fields.shown(parameters)}", field="parameters")
    for name in parameters:
        if given.get(name) is not None:
            raise RequestError(f"{fields.shown(name)} is given twice: in parameters, too", field="parameters")
    return given | dict(parameters)


class _Generated(OpenAnswers):
    """One prompt's answers.

    Args:
        about: what every object says.
        inference: the request.
        events: whether objects are server-sent events; see `OpenAnswers` for the others.
    """

    def __init__(
        self,
        engine_ids: tuple[str, ...],
        completions: list[Completion],
        signal: Signal,
        about: Mapping[str, Any],
        inference: Inference,
        events: bool,
        stream: bool,
    ) -> None:
        super().__init__(engine_ids, completions, signal, events and stream)
        self._about = {**about, "sequence_start": False, "sequence_end": False, "sequence_id": 0}
        self._many = inference.input.params.n > 1
        self._events = events

    def chunk(self) -> Reply | None:
        """An event for each answer that has said something."""
        (completion,) = self.completions
        events = [self._event(self._said([delta]) | self._place(delta)) for delta in completion.take()]
        if completion.error is not None:
            events.append(self._event({"error": completion.error}))
        if not events:
            return None
        # A stream's first chunk must promise another; an answer that is complete already goes out as a whole.
        more = True if not completion.finished else (False if self.begun else None)
        self.begun = True
        return Reply(b"".join(events), SSE, more=more)

    def whole(self) -> Reply:
        """One object."""
        content = self._said(self.completions[0].take())
        return Reply(self._event(content), SSE) if self._events else json_reply(content)

    def error(self, error: Exception) -> Reply:
        """In Triton's words."""
        return triton_error(error)

    def broken(self, message: str) -> Reply:
        """The last event."""
        return Reply(self._event({"error": error_text(EngineError(message))}), SSE, more=False)

    def _said(self, deltas: list[Delta]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"text_output": [delta.text for delta in deltas]}
        columns: dict[str, list[Any]] = {
            "cum_log_probs": [delta.cumulative_logprob for delta in deltas],
            "output_log_probs": [delta.logprobs for delta in deltas],
        }
        found |= {name: column for name, column in columns.items() if None not in column}
        if not self._many or len(deltas) == 1:
            return {**self._about, **{name: column[0] for name, column in found.items()}}
        return {**self._about, **found}

    def _place(self, delta: Delta) -> dict[str, int]:
        return {"sequence_index": delta.index} if self._many else {}

    def _event(self, content: Mapping[str, Any]) -> bytes:
        return b"data: " + json_line(content) + b"\n"

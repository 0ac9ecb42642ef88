"""KServe v2's infer: a batch of prompts as tensors, in JSON or with the binary extension."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tpserve.engine import fields
from tpserve.engine.errors import RequestError
from tpserve.engine.requests import URGENCY_FIELDS
from tpserve.handler.http import HttpRequest
from tpserve.handler.predictions import decode, parse_json, readable_body
from tpserve.handler.triton.fields import LOG_PROBS, Inference, read_inference
from tpserve.handler.triton.model import OUTPUTS
from tpserve.handler.triton.tensors import Tensor, read_tensor

if TYPE_CHECKING:
    from tpserve.handler.backend import Backend

LENGTH_HEADER = "inference-header-content-length"
MAX_BATCH_SIZE = 128
_PROMPTS = ("text_input", "input_ids")
_LOG_PROBS = ("cum_log_probs", "output_log_probs")
_KEYS = ("id", "inputs", "outputs", "parameters")
# What belongs to sequences of requests, and to priorities that are no numbers of ours: their defaults are let pass.
_NOT_SERVED = ("sequence_id", "sequence_start", "sequence_end", "priority")


@dataclasses.dataclass(frozen=True)
class InferRequest:
    """What is asked for.

    Attributes:
        rows: one a prompt.
        outputs: names, and whether they are to be binary; None: all that there are.
        binary: whether outputs are binary that say nothing themselves.
        id: to be told in the reply.
    """

    rows: tuple[Inference, ...]
    outputs: Mapping[str, bool] | None
    binary: bool = False
    id: str = ""


def read_infer(request: HttpRequest, backend: Backend) -> InferRequest:
    """Reads a request.

    Raises:
        RequestError: names the tensor, or what else is at fault.
    """
    given, binary = _split(request)
    for key in given:
        if key not in _KEYS:
            raise fields.unknown_field(key, _KEYS)
    parameters = given.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise RequestError(f"parameters must be an object, got {fields.shown(parameters)}", field="parameters")
    parameters = dict(parameters)
    all_binary = fields.boolean("binary_data_output", parameters.pop("binary_data_output", False))
    shared = _shared(parameters)
    tensors = _tensors(given.get("inputs"), binary)
    for name in URGENCY_FIELDS:
        if name in tensors:
            raise RequestError(f"{name} is the whole request's, not a prompt's; send it in parameters", field=name)
    for name in shared:
        if name in tensors:
            raise RequestError(f"{fields.shown(name)} is given twice: in parameters, too", field="parameters")
    outputs = _outputs(given.get("outputs"), all_binary)
    if backend.tokenizer is None and "text_output" in (outputs or {}):
        raise RequestError("outputs: this model has no tokenizer, and so no text_output", field="outputs")
    rows = [{**shared, **row} for row in _rows(tensors)]
    if any(name in (outputs or {}) for name in _LOG_PROBS):  # asking for them is asking for them
        rows = [{name: row[name] for name in row if name not in LOG_PROBS} | {"return_log_probs": True} for row in rows]
    about = given.get("id")
    return InferRequest(
        tuple(_inference(row, backend) for row in rows),
        outputs,
        all_binary,
        "" if about is None else fields.string("id", about),
    )


def _inference(row: dict[str, Any], backend: Backend) -> Inference:
    if row.pop("stream", None) not in (None, False, [False], [[False]]):
        raise RequestError("stream: infer answers as a whole; streams are had from generate_stream", field="stream")
    return read_inference(row, backend)


def _split(request: HttpRequest) -> tuple[dict[str, Any], _Binary]:
    """The JSON, and the bytes after it."""
    body = readable_body(request)
    length = request.headers.get(LENGTH_HEADER)
    rest = b""
    if isinstance(body, bytes | bytearray | memoryview):
        body = bytes(body)
        if length is not None:
            if not (length.isascii() and length.isdigit() and len(length) < 16 and int(length) <= len(body)):
                raise RequestError(
                    f"Inference-Header-Content-Length must be at most the body's {len(body)} bytes, got "
                    f"{fields.shown(length)}",
                    field="Inference-Header-Content-Length",
                )
            body, rest = body[: int(length)], body[int(length) :]
        body = decode(body)
    if isinstance(body, str):
        body = parse_json(body)
    if not isinstance(body, Mapping):
        raise RequestError(f"the body must be a JSON object with inputs, got {fields.shown(body)}", field="inputs")
    return dict(body), _Binary(rest)


class _Binary:
    """The bytes after the JSON, taken from the front."""

    def __init__(self, rest: bytes) -> None:
        self.rest = memoryview(rest)

    def take(self, name: str, size: int) -> bytes:
        if not 0 <= size <= len(self.rest):
            raise RequestError(f"{name} has {size} bytes; {len(self.rest)} are left in the body", field=name)
        found, self.rest = self.rest[:size], self.rest[size:]
        return bytes(found)


def _tensors(inputs: Any, binary: _Binary) -> dict[str, Tensor]:
    if not isinstance(inputs, list) or not inputs:
        raise RequestError(f"inputs must be a non-empty list of tensors, got {fields.shown(inputs)}", field="inputs")
    tensors: dict[str, Tensor] = {}
    for i, given in enumerate(inputs):
        tensor = read_tensor(given, f"inputs[{i}]", binary.take)
        if tensor.name in tensors:
            raise RequestError(f"{tensor.name} is given twice", field=tensor.name)
        tensors[tensor.name] = tensor
    if len(binary.rest):
        raise RequestError(f"inputs: {len(binary.rest)} bytes after the last tensor are nobody's", field="inputs")
    return tensors


def _rows(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The fields of each prompt."""
    prompts = [tensors[name] for name in _PROMPTS if name in tensors]
    if not prompts:
        raise RequestError("inputs must hold text_input or input_ids", field="text_input")
    prompt = prompts[0]
    is_one = not prompt.shape or (prompt.name == "input_ids" and len(prompt.shape) == 1)
    num_rows = 1 if is_one else prompt.shape[0]
    if not 1 <= num_rows <= MAX_BATCH_SIZE:
        raise RequestError(f"{prompt.name} has {num_rows} rows; from 1 to {MAX_BATCH_SIZE} are admitted", prompt.name)
    columns = {name: tensor.rows(num_rows) for name, tensor in tensors.items()}
    return [{name: column[i] for name, column in columns.items()} for i in range(num_rows)]


def _shared(parameters: dict[str, Any]) -> dict[str, Any]:
    """Fields that the request's own parameters give to all prompts."""
    for name in _NOT_SERVED:
        if parameters.pop(name, 0) not in (0, False, ""):
            raise RequestError(f"{name} is not served; leave it out", field=name)
    timeout_us = parameters.pop("timeout", None)
    if timeout_us is not None:
        if fields.integer("timeout", timeout_us) < 0:
            raise RequestError(f"timeout must be microseconds, got {timeout_us}", field="timeout")
        if timeout_us:
            parameters["timeout_s"] = timeout_us / 1e6
    return parameters


def _outputs(outputs: Any, binary: bool) -> dict[str, bool] | None:
    if outputs is None:
        return None
    if not isinstance(outputs, list):
        raise RequestError(f"outputs must be a list, got {fields.shown(outputs)}", field="outputs")
    found: dict[str, bool] = {}
    for i, output in enumerate(outputs):
        name = output.get("name") if isinstance(output, Mapping) else None
        if not isinstance(name, str) or name not in OUTPUTS:
            raise RequestError(
                f"outputs[{i}].name must be one of {', '.join(OUTPUTS)}, got {fields.shown(name)}", "outputs"
            )
        parameters = output.get("parameters") or {}
        if not isinstance(parameters, Mapping) or not set(parameters) <= {"binary_data"}:
            raise RequestError(f"outputs[{i}]: of parameters, only binary_data is served", field="outputs")
        found[name] = fields.boolean("binary_data", parameters.get("binary_data", binary))
    return found or None

"""What infer answers: the batch's answers as tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from tpserve.engine.answer import Delta
from tpserve.engine.completion import Completion
from tpserve.engine.errors import EngineError
from tpserve.handler.http import Signal
from tpserve.handler.open_request import OpenAnswers
from tpserve.handler.replies import Reply, json_reply
from tpserve.handler.triton.errors import triton_error
from tpserve.handler.triton.infer import InferRequest
from tpserve.handler.triton.model import OUTPUTS, VERSION
from tpserve.handler.triton.tensors import Tensor, pack

_BINARY = "application/octet-stream"


class Inferred(OpenAnswers):
    """A batch of prompts.

    Args:
        request: what is asked for.
        model: as it was called.
        has_text: the model has a tokenizer; see `OpenAnswers` for the others.
    """

    def __init__(
        self,
        engine_ids: tuple[str, ...],
        completions: list[Completion],
        signal: Signal,
        request: InferRequest,
        model: str,
        has_text: bool,
    ) -> None:
        super().__init__(engine_ids, completions, signal, stream=False)
        self._request = request
        self._model = model
        self._has_text = has_text

    def whole(self) -> Reply:
        """All tensors."""
        error = next((one.error for one in self.completions if one.error is not None), None)
        if error is not None:
            return triton_error(EngineError(error))
        tensors = self._tensors([completion.take() for completion in self.completions])
        wanted = self._request.outputs
        if wanted is None:
            return self._reply(dict.fromkeys(tensors, self._request.binary), tensors)
        return self._reply({name: binary for name, binary in wanted.items() if name in tensors}, tensors)

    def error(self, error: Exception) -> Reply:
        """In Triton's words."""
        return triton_error(error)

    def broken(self, message: str) -> Reply:
        """Nothing is told before the end."""
        return triton_error(EngineError(message))

    def _tensors(self, rows: list[list[Delta]]) -> dict[str, Tensor]:
        num_answers = max(map(len, rows))
        shape = (len(rows), num_answers)
        nothing = Delta(0)
        answers = [(i, delta) for i, row in enumerate(rows) for delta in [*row, *[nothing] * (num_answers - len(row))]]
        ids = [self._prompt(i) + delta.ids for i, delta in answers]
        pad_id = self._request.rows[0].pad_id
        found = {"output_ids": _padded("output_ids", ids, shape, pad_id)}
        found["sequence_length"] = _tensor("sequence_length", shape, [len(of_one) for of_one in ids])
        if self._has_text:
            texts = [delta.text for _, delta in answers]
            found["text_output"] = _tensor("text_output", (len(texts),), texts)
        if any(delta.cumulative_logprob is not None for _, delta in answers):
            sums = [delta.cumulative_logprob or 0.0 for _, delta in answers]
            found["cum_log_probs"] = _tensor("cum_log_probs", shape, sums)
        if any(delta.logprobs is not None for _, delta in answers):
            found["output_log_probs"] = _padded(
                "output_log_probs", [delta.logprobs or [] for _, delta in answers], shape, 0.0
            )
        return found

    def _prompt(self, row: int) -> list[int]:
        inference = self._request.rows[row]
        return inference.input.token_ids if inference.with_prompt else []

    def _reply(self, wanted: dict[str, bool], tensors: dict[str, Tensor]) -> Reply:
        content: dict[str, Any] = {"id": self._request.id} if self._request.id else {}
        content |= {"model_name": self._model, "model_version": VERSION, "outputs": []}
        packed: list[bytes] = []
        for name, binary in wanted.items():
            tensor = tensors[name]
            output: dict[str, Any] = {"name": name, "datatype": tensor.datatype, "shape": tensor.shape}
            if binary:
                packed.append(pack(tensor))
                output["parameters"] = {"binary_data_size": len(packed[-1])}
            else:
                output["data"] = tensor.data
            content["outputs"].append(output)
        if not packed:
            return json_reply(content)
        header = json.dumps(content, ensure_ascii=False).encode()
        length = ("Inference-Header-Content-Length", str(len(header)))
        return Reply(header + b"".join(packed), _BINARY, headers=(length,))


def _tensor(name: str, shape: tuple[int, ...], data: Sequence[Any]) -> Tensor:
    return Tensor(name, OUTPUTS[name][0], shape, data)


def _padded(name: str, rows: list[list[Any]], shape: tuple[int, ...], pad: Any) -> Tensor:
    longest = max(map(len, rows))
    data = [value for row in rows for value in [*row, *[pad] * (longest - len(row))]]
    assert len(data) == math.prod(shape) * longest
    return _tensor(name, (*shape, longest), data)

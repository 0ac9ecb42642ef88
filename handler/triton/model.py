"""What we say about ourselves: names, inputs and outputs."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

from tpserve.engine.errors import RequestError

if TYPE_CHECKING:
    from tpserve.handler.backend import Backend

VERSION = "1"
# What clients of the other servers call the one model that there is.
_NAMES = ("ensemble", "tensorrt_llm_bls", "tensorrt_llm", "llama", "fastertransformer")

_INPUTS = (
    ("text_input", "BYTES", [-1]), ("input_ids", "INT32", [-1]), ("input_lengths", "INT32", [1]),
    ("max_tokens", "INT32", [1]), ("request_output_len", "INT32", [1]), ("min_length", "INT32", [1]),
    ("temperature", "FP32", [1]), ("top_k", "INT32", [1]), ("top_p", "FP32", [1]),
    ("runtime_top_k", "INT32", [1]), ("runtime_top_p", "FP32", [1]), ("random_seed", "UINT64", [1]),
    ("repetition_penalty", "FP32", [1]), ("presence_penalty", "FP32", [1]), ("frequency_penalty", "FP32", [1]),
    ("beam_width", "INT32", [1]), ("length_penalty", "FP32", [1]), ("len_penalty", "FP32", [1]),
    ("early_stopping", "BOOL", [1]), ("num_return_sequences", "INT32", [1]),
    ("stop_words", "BYTES", [-1]), ("bad_words", "BYTES", [-1]), ("stop_words_list", "INT32", [2, -1]),
    ("bad_words_list", "INT32", [2, -1]), ("embedding_bias_words", "BYTES", [-1]),
    ("embedding_bias_weights", "FP32", [-1]), ("embedding_bias", "FP32", [-1]), ("start_id", "INT32", [1]),
    ("end_id", "INT32", [1]), ("pad_id", "INT32", [1]), ("return_log_probs", "BOOL", [1]),
    ("is_return_log_probs", "BOOL", [1]), ("exclude_input_in_output", "BOOL", [1]), ("stream", "BOOL", [1]),
)  # fmt: skip
OUTPUTS = {
    "text_output": ("BYTES", [-1]),
    "output_ids": ("INT32", [-1, -1]),
    "sequence_length": ("INT32", [-1]),
    "cum_log_probs": ("FP32", [-1]),
    "output_log_probs": ("FP32", [-1, -1]),
}


def check_model(name: str, version: str, backend: Backend) -> None:
    """Whether it is the model that is served.

    Raises:
        RequestError: 404, it is another.
    """
    if name != backend.model_name and name not in _NAMES:
        raise RequestError(f"model: unknown model {name!a}; {backend.model_name!r} is served", "model", 404)
    if version != VERSION:
        raise RequestError(f"version: model {name!a} has version {VERSION} only, not {version!a}", "version", 404)


def server_metadata() -> dict[str, Any]:
    """Of `v2`."""
    return {
        "name": "tpserve",
        "version": importlib.metadata.version("tpserve"),
        "extensions": ["generate", "binary_tensor_data"],
    }


def model_metadata(name: str) -> dict[str, Any]:
    """Of `v2/models/{m}`; the first dimension is the batch's."""
    inputs = [{"name": field, "datatype": datatype, "shape": [-1, *dims]} for field, datatype, dims in _INPUTS]
    outputs = [
        {"name": field, "datatype": datatype, "shape": dims if field == "text_output" else [-1, *dims]}
        for field, (datatype, dims) in OUTPUTS.items()
    ]
    return {"name": name, "versions": [VERSION], "platform": "tpserve", "inputs": inputs, "outputs": outputs}


def model_config(name: str, max_batch_size: int) -> dict[str, Any]:
    """Of `v2/models/{m}/config`, as far as there is anything to say."""
    return {
        "name": name,
        "platform": "tpserve",
        "backend": "tpserve",
        "max_batch_size": max_batch_size,
        "input": [
            {"name": field, "data_type": _type(datatype), "dims": dims, "optional": True}
            for field, datatype, dims in _INPUTS
        ],
        "output": [
            {"name": field, "data_type": _type(datatype), "dims": dims} for field, (datatype, dims) in OUTPUTS.items()
        ],
        "model_transaction_policy": {"decoupled": False},
    }


def _type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"

"""KServe v2's infer, asked by Triton's own client, and the paths beside it."""

from __future__ import annotations

import json
import struct
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult

from tests.handler.triton.asking import Asking, taken
from tests.handler.triton.test_generate import ANY_JSON, CAT, PROMPT
from tpserve.handler.open_request import Pending
from tpserve.handler.replies import Reply
from tpserve.handler.triton.model import OUTPUTS
from tpserve.handler.triton.tensors import DATATYPES

INFER = "v2/models/fastertransformer/infer"
LENGTH = "inference-header-content-length"


@pytest.fixture
def asking() -> Asking:
    return Asking()


def tensor(name: str, value: Any, kind: str, binary: bool = True) -> InferInput:
    dtype = {"BYTES": object, "BOOL": bool, "FP32": np.float32}.get(kind) or getattr(np, kind.lower())
    array = np.array(value, dtype=dtype)
    made = InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def body_of(*inputs: InferInput, **more: Any) -> tuple[bytes, dict[str, str]]:
    body, length = InferenceServerClient.generate_request_body(list(inputs), **more)
    return body, {} if length is None else {LENGTH: str(length)}


def result(pending: Pending) -> InferResult:
    reply = taken(pending)
    assert (reply.status, reply.more) == (200, None)
    lengths = [int(value) for name, value in reply.headers if name.lower() == LENGTH]
    return InferenceServerClient.parse_response_body(reply.body, header_length=lengths[0] if lengths else None)


@pytest.mark.parametrize("binary", [True, False])
def test_a_text(asking: Asking, binary: bool) -> None:
    inputs = [
        tensor("text_input", [["once upon a time"]], "BYTES", binary),
        tensor("max_tokens", [[5]], "INT32", binary),
        tensor("stop_words", [["dög", "cow"]], "BYTES", binary),
        tensor("temperature", [[0.5]], "FP32", binary),
        tensor("stream", [[False]], "BOOL", binary),
        tensor("random_seed", [[2**64 - 1]], "UINT64", binary),
    ]
    outputs = [InferRequestedOutput(name, binary_data=binary) for name in ("text_output", "sequence_length")]
    body, headers = body_of(*inputs, outputs=outputs, request_id="a7")
    pending = asking.open(INFER, body, headers)
    params = asking.params()
    assert asking.prompt() == PROMPT
    assert (params.max_new_tokens, params.stop, params.temperature) == (5, ("dög", "cow"), 0.5)
    assert params.seed == 2**64 - 1
    asking.say(CAT, "length")
    said = result(pending)
    assert said.as_numpy("text_output").tolist() == ([b"the cat"] if binary else ["the cat"])
    assert said.as_numpy("sequence_length").tolist() == [[len(CAT)]]
    assert (said.get_response()["id"], said.get_response()["model_name"]) == ("a7", "fastertransformer")
    assert [output["name"] for output in said.get_response()["outputs"]] == ["text_output", "sequence_length"]


def test_a_batch_of_fastertransformers(asking: Asking) -> None:
    body, headers = body_of(
        tensor("input_ids", [[5, 6, 7], [8, 9, 0]], "UINT32"), tensor("input_lengths", [[3], [2]], "UINT32"),
        tensor("request_output_len", [[4], [6]], "UINT32"), tensor("runtime_top_k", [[1], [2]], "UINT32"),
        tensor("runtime_top_p", [[0.0], [0.5]], "FP32"), tensor("is_return_log_probs", [[True], [True]], "BOOL"),
        tensor("bad_words_list", [[[5, 6], [2, -1]], [[0, 0], [-1, -1]]], "INT32"), tensor("end_id", [[2]], "UINT32"),
        tensor("pad_id", [3], "INT32"),
    )  # fmt: skip
    pending = asking.open(INFER, body, headers)
    assert (asking.prompt(0), asking.prompt(1)) == ([5, 6, 7], [8, 9])
    first, second = asking.params(0), asking.params(1)
    assert (first.max_new_tokens, first.top_k, first.top_p, first.bad_words) == (4, 1, 1.0, ((5, 6),))
    assert (second.max_new_tokens, second.top_k, second.top_p, second.bad_words) == (6, 2, 0.5, ())
    assert first.stop_token_ids == second.stop_token_ids == (2,)
    asking.say([10, 11], "stop", row=1, logprobs=[-0.5, -0.25], top_logprobs=[[], []])
    assert pending.take() is None
    asking.say([12, 13, 14], "length", row=0, logprobs=[-1.0] * 3, top_logprobs=[[]] * 3)
    said = result(pending)
    assert said.as_numpy("output_ids").tolist() == [[[5, 6, 7, 12, 13, 14]], [[8, 9, 10, 11, 3, 3]]]
    assert said.as_numpy("sequence_length").tolist() == [[6], [4]]
    assert said.as_numpy("cum_log_probs").tolist() == [[-3.0], [-0.75]]
    assert said.as_numpy("output_log_probs").tolist() == [[[-1.0, -1.0, -1.0]], [[-0.5, -0.25, 0.0]]]
    assert {output["name"]: output["datatype"] for output in said.get_response()["outputs"]} == {
        name: datatype for name, (datatype, _) in OUTPUTS.items()
    }


def test_prompts_are_left_out_if_asked(asking: Asking) -> None:
    excluded = tensor("exclude_input_in_output", [[True]], "BOOL")
    pending = asking.open(INFER, *body_of(tensor("input_ids", [5, 6], "INT64"), excluded))
    asking.say([7], "stop")
    assert result(pending).as_numpy("output_ids").tolist() == [[[7]]]


def test_beams(asking: Asking) -> None:
    inputs = [tensor("text_input", [["one"], ["two"]], "BYTES"), tensor("beam_width", [[2]], "INT32")]
    pending = asking.open(INFER, *body_of(*inputs))
    for row in range(2):
        asking.say(CAT, "stop", row=row, cumulative_logprob=-1.0 - row)
        asking.say(CAT[:1], "stop", row=row, index=1, cumulative_logprob=-3.0)
    said = result(pending)
    assert said.as_numpy("text_output").tolist() == [b"the cat", b"the", b"the cat", b"the"]
    assert said.as_numpy("cum_log_probs").tolist() == [[-1.0, -3.0], [-2.0, -3.0]]
    assert said.as_numpy("sequence_length").tolist() == [[len(CAT), 1], [len(CAT), 1]]


def test_an_output_that_is_named_is_computed(asking: Asking) -> None:
    outputs = [InferRequestedOutput("cum_log_probs")]
    inputs = [tensor("text_input", ["x"], "BYTES"), tensor("return_log_probs", [False], "BOOL")]
    pending = asking.open(INFER, *body_of(*inputs, outputs=outputs))
    asking.say([7], "stop", logprobs=[-0.5], top_logprobs=[[]])
    assert result(pending).as_numpy("cum_log_probs").tolist() == [[-0.5]]


def test_parameters_are_every_prompts(asking: Asking) -> None:
    text = tensor("text_input", [["x"], ["y"]], "BYTES")
    asking.open(INFER, *body_of(text, timeout=2_500_000, parameters={"max_tokens": 3}))
    assert asking.params(0).max_new_tokens == asking.params(1).max_new_tokens == 3
    assert asking.engine.urgency["r1/0"] == asking.engine.urgency["r1/1"] == (0, 2.5)


def test_failures(asking: Asking) -> None:
    body, headers = body_of(tensor("text_input", [["x"], ["y"]], "BYTES"))
    pending = asking.open(INFER, body, headers)
    asking.say([], "error", row=1, error="rank 1 died")
    reply = taken(pending)
    assert (reply.status, reply.body) == (503, b'{"error": "rank 1 died"}\n')


def given_tensor(**changed: Any) -> dict[str, Any]:
    return {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["x"], **changed}


def also(**other: Any) -> dict[str, Any]:
    return {"inputs": [given_tensor(), {"shape": [1], "datatype": "INT32", **other}]}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "inputs must be a non-empty list"),
        ([], "inputs"),
        ({"inputs": [3]}, "inputs[0] must be an object"),
        ({"inputs": [given_tensor(name="x y")]}, "inputs[0].name must be"),
        ({"inputs": [given_tensor(shape=[-1])]}, "text_input[0] must be"),
        ({"inputs": [given_tensor(shape="1")]}, "text_input: shape must be"),
        ({"inputs": [given_tensor(shape=[2**31 - 1, 0], data=[])]}, "text_input: shape"),
        ({"inputs": [given_tensor(shape=[2])]}, "text_input has 1 elements; its shape [2] says 2"),
        ({"inputs": [given_tensor(datatype="BF16")]}, "text_input: datatype must be one of"),
        ({"inputs": [given_tensor(data=[3])]}, "text_input must be a string"),
        ({"inputs": [given_tensor(data="x")]}, "text_input has no data"),
        ({"inputs": [given_tensor(data=["x", ["y"]])]}, "text_input: data is nested unevenly"),
        ({"inputs": [given_tensor(mood=1)]}, "inputs[0] has an unknown key 'mood'"),
        ({"inputs": [given_tensor(parameters={"binary_data_size": 1})]}, "text_input has both data and"),
        ({"inputs": [given_tensor(), given_tensor()]}, "text_input is given twice"),
        ({"inputs": [given_tensor(shape=[200], data=["x"] * 200)]}, "text_input has 200 rows"),
        ({"inputs": [given_tensor(shape=[0], data=[])]}, "text_input has 0 rows"),
        ({"inputs": [given_tensor(name="max_tokens", datatype="INT32", data=[1])]}, "must hold text_input or"),
        (also(name="max_tokens", data=[2**31]), "max_tokens must hold INT32"),
        (also(name="max_tokens", data=[True]), "max_tokens must be an integer"),
        (also(name="top_p", datatype="FP32", data=["x"]), "top_p must be a number"),
        (also(name="timeout_s", data=[1]), "timeout_s is the whole request's"),
        (also(name="top_pp", data=[1]), "did you mean 'top_p'"),
        (also(name="stream", datatype="BOOL", data=[True]), "generate_stream"),
        (also(name="prompt_embedding_table", data=[1]), "prompt_embedding_table is not served"),
        ({"inputs": [given_tensor(shape=[2], data=["x", "y"]), {"name": "top_k", "shape": [3], "datatype": "INT32",
          "data": [1, 2, 3]}]}, "top_k has 3 rows, the batch has 2"),
        ({"inputs": [given_tensor()], "outputs": [{"name": "context_logits"}]}, "outputs[0].name must be one of"),
        ({"inputs": [given_tensor()], "outputs": [{"name": "output_ids", "parameters": {"classification": 3}}]},
         "outputs[0]: of parameters, only binary_data"),
        ({"inputs": [given_tensor()], "parameters": {"sequence_id": 3}}, "sequence_id is not served"),
        ({"inputs": [given_tensor()], "parameters": {"timeout": -3}}, "timeout must be microseconds"),
        ({"inputs": [given_tensor()], "parameters": {"text_input": "y"}}, "'text_input' is given twice"),
        ({"inputs": [given_tensor()], "model": 1}, "unknown field 'model'"),
    ],
)  # fmt: skip
def test_what_is_refused(asking: Asking, body: Any, said: str) -> None:
    assert said in asking.refusal(INFER, body)


@pytest.mark.parametrize(
    ("size", "datatype", "rest", "said"),
    [
        (3, "BYTES", b"\x01\x00\x00", "text_input ends inside element 0"),
        (5, "BYTES", b"\x02\x00\x00\x00x", "text_input ends inside element 0"),
        (5, "BYTES", b"\x01\x00\x00\x00\xff", "text_input: element 0 is not UTF-8"),
        (5, "BYTES", b"\x01\x00\x00\x00", "text_input has 5 bytes; 4 are left"),
        (-1, "BYTES", b"", "text_input has -1 bytes"),
        (5, "BYTES", b"\x01\x00\x00\x00xy", "1 bytes after the last tensor"),
        (3, "INT32", b"abc", "text_input has 3 bytes; an element of INT32 has 4"),
        (4, "FP32", struct.pack("<f", float("nan")), "text_input must be finite"),
    ],
)
def test_bytes_that_are_no_tensor(asking: Asking, size: int, datatype: str, rest: bytes, said: str) -> None:
    one = given_tensor(datatype=datatype, parameters={"binary_data_size": size})
    del one["data"]
    header = json.dumps({"inputs": [one]}).encode()
    assert said in asking.refusal(INFER, header + rest, {LENGTH: str(len(header))})


@pytest.mark.parametrize("length", ["x", "-1", "9999", "1" * 40])
def test_the_length_of_the_header(asking: Asking, length: str) -> None:
    assert "Inference-Header-Content-Length" in asking.refusal(INFER, b"{}", {LENGTH: length})


ELEMENTS = st.one_of(st.text(max_size=3), st.integers(-1, 5), st.booleans())
TENSORS = st.fixed_dictionaries(
    {"name": st.sampled_from(["text_input", "input_ids", "max_tokens", "stop_words_list", "pad_id", "n"]),
     "shape": st.lists(st.integers(0, 3), max_size=3), "datatype": st.sampled_from(DATATYPES)},
    optional={"data": st.lists(ELEMENTS, max_size=4) | ANY_JSON,
              "parameters": ANY_JSON | st.builds(lambda n: {"binary_data_size": n}, st.integers(0, 9))},
)  # fmt: skip
SHARED = Asking()


@settings(max_examples=150, deadline=None)
@given(st.lists(TENSORS, max_size=3), ANY_JSON, st.binary(max_size=12))
@example([given_tensor(shape=[], data=["x"])], None, b"")
@example([given_tensor(shape=[1, 0], data=[])], None, b"")
@example([{"name": "input_ids", "shape": [1, 1, 1], "datatype": "INT32", "data": [1]}], [], b"")
def test_arbitrary_tensors_never_raise(tensors: list[Any], other: Any, rest: bytes) -> None:
    for given_ in ({"inputs": tensors}, {"inputs": tensors, "outputs": other, "parameters": other}, other):
        header = json.dumps(given_).encode()
        opened = SHARED.start(INFER, header + rest, {LENGTH: str(len(header))})
        assert not isinstance(opened, Reply) or opened.status == 400, opened.body


def test_the_server_and_the_model_describe_themselves(asking: Asking) -> None:
    server = json.loads(asking.now("v2").body)
    assert (server["name"], server["extensions"]) == ("tpserve", ["generate", "binary_tensor_data"])
    for path in ("v2/models/llama", "v2/models/llama/versions/1"):
        model = json.loads(asking.now(path).body)
        assert (model["name"], model["versions"], model["platform"]) == ("llama", ["1"], "tpserve")
        assert {"name": "max_tokens", "datatype": "INT32", "shape": [-1, 1]} in model["inputs"]
        assert [output["name"] for output in model["outputs"]] == list(OUTPUTS)
    config = json.loads(asking.now("v2/models/llama/config").body)
    assert config["max_batch_size"] > 1
    assert {"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]} in config["output"]


def test_health(asking: Asking) -> None:
    for ready, status in ((True, 200), (False, 503)):
        asking.engine.ready = ready
        time.sleep(0.25)  # a probe's answer holds so long for all that ask
        for path in ("v2/health/ready", "v2/models/ensemble/ready", "v2/models/ensemble/versions/1/ready"):
            reply = asking.now(path)
            assert (reply.status, b"starting" in reply.body) == (status, not ready)
        assert asking.now("v2/health/live") == Reply(b"")


@pytest.mark.parametrize("name", ["ensemble", "tensorrt_llm_bls", "tensorrt_llm", "llama", "fastertransformer", "mine"])
def test_names_of_the_one_model(asking: Asking, name: str) -> None:
    asking.backend.model_name = "mine"
    assert json.loads(asking.now(f"v2/models/{name}").body)["name"] == name


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("v2/models/gpt", "unknown model 'gpt'"),
        ("v2/models/gpt/generate", "unknown model 'gpt'"),
        ("v2/models/llama/versions/2/generate", "not '2'"),
        ("v2/models/llama/generate/more", "generate_stream, infer"),
        ("v2/models/llama/trace", "generate_stream, infer"),
    ],
)
def test_what_is_not_there(asking: Asking, path: str, said: str) -> None:
    assert said in asking.refusal(path, {"text_input": "x"}, status=404)

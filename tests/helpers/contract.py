"""What every front must do for its clients, with real servers: imported by the tests of each front.

The module that imports these tests gives a fixture `address`: where the paths begin, what the model is called, and the
key that is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tritonclient.http as triton

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "once upon a time"}]
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "green"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["color", "n"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": SCHEMA}}


@dataclasses.dataclass(frozen=True)
class Address:
    """Of a front.

    Attributes:
        url: where the protocols' paths begin, without a slash at its end.
        model: what it is called.
        key: that is asked for; "": none.
        predictions: the path of our own protocol.
        log: what the server writes.
    """

    url: str
    model: str
    log: Path
    key: str = ""
    predictions: str = ""

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, bytes]:
        """One request by hand: status, headers, body. With a body it is a POST."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"} | (headers or {})
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as e:
            with e:
                return e.code, e.headers, e.read()


@pytest.fixture
def client(address: Address) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address.url}/v1", api_key=address.key or "none", max_retries=0, timeout=60) as one:
        yield one


def test_openai_lists_the_model(client: openai.OpenAI, address: Address) -> None:
    assert [model.id for model in client.models.list()] == [address.model]
    assert client.models.retrieve(address.model).object == "model"
    with pytest.raises(openai.NotFoundError, match="another"):
        client.models.retrieve("another")


def test_openai_streams_what_it_says_whole(client: openai.OpenAI, address: Address) -> None:
    asked: dict[str, Any] = {"model": address.model, "messages": CHAT, "max_completion_tokens": 150, "seed": 3}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    choice = whole.choices[0]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == [choice.finish_reason]
    assert len(chunks) > 5  # not all at once
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_openai_answers_by_schema_and_calls_tools(client: openai.OpenAI, address: Address) -> None:
    asked: dict[str, Any] = {"model": address.model, "messages": CHAT, "max_tokens": 100, "seed": 1}
    formed = client.chat.completions.create(
        **asked, response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    )
    content = json.loads(formed.choices[0].message.content or "")
    assert set(content) == {"color", "n"}
    assert content["color"] in ("red", "green")
    called = client.chat.completions.create(**asked, tools=[TOOL], tool_choice="required")
    (call,) = called.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "paint"
    assert set(json.loads(call.function.arguments)) == {"color", "n"}
    assert called.choices[0].finish_reason == "tool_calls"


def test_openai_completions_as_lm_eval_asks_for_them(client: openai.OpenAI, address: Address) -> None:
    prompts = ["once upon a time", "the cat"]
    scored = client.completions.create(
        model=address.model, prompt=prompts, max_tokens=0, echo=True, logprobs=1, temperature=0
    )
    assert [choice.text for choice in scored.choices] == prompts
    for choice in scored.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        first, *others = choice.logprobs.token_logprobs
        assert first is None
        assert others
        assert all(value <= 0 for value in others)
    drawn = client.completions.create(model=address.model, prompt=prompts, n=2, max_tokens=5, temperature=1, seed=7)
    assert [choice.index for choice in drawn.choices] == [0, 1, 2, 3]
    assert drawn.usage is not None
    assert drawn.usage.completion_tokens <= 20


def test_openai_refusals_name_the_field(client: openai.OpenAI, address: Address) -> None:
    asked: dict[str, Any] = {"model": address.model, "messages": CHAT}
    for field, value in (("temperature", -1), ("top_p", 2), ("n", 0), ("max_tokens", "many"), ("messages", [])):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**{**asked, field: value})
        assert refused.value.param == field
        assert field in refused.value.message
    status, _, body = address.ask("v1/completions", b'{"prompt": "a", "temperature": NaN}')
    assert status == 400
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_openapi_document_is_served(address: Address) -> None:
    status, _, body = address.ask("openapi.json")
    assert status == 200
    assert "/v1/chat/completions" in json.loads(body)["paths"]


def test_triton_generates(address: Address) -> None:
    asked = {"text_input": "once upon a time", "max_tokens": 12, "random_seed": 5, "temperature": 1.0, "top_k": 0}
    status, _, body = address.ask("v2/models/ensemble/generate", asked)
    assert status == 200
    whole = json.loads(body)["text_output"]
    status, headers, body = address.ask("v2/models/ensemble/generate_stream", {**asked, "stream": True})
    assert status == 200
    assert headers["Content-Type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: ")]
    assert "".join(event["text_output"] for event in events) == whole
    status, _, body = address.ask("v2/models/ensemble/generate", {**asked, "top_p": 3})
    assert status == 400
    assert "top_p" in json.loads(body)["error"]


def test_tritonclient_infers(address: Address) -> None:
    text = triton.InferInput("text_input", [1, 1], "BYTES")
    text.set_data_from_numpy(np.array([[b"once upon a time"]], dtype=object), binary_data=False)
    limit = triton.InferInput("max_tokens", [1, 1], "INT32")
    limit.set_data_from_numpy(np.array([[12]], dtype=np.int32), binary_data=False)
    body, header_length = triton.InferenceServerClient.generate_request_body([text, limit])
    assert header_length is None
    status, headers, answer = address.ask("v2/models/ensemble/infer", body)
    assert status == 200, answer
    length = headers.get("Inference-Header-Content-Length")
    result = triton.InferenceServerClient.parse_response_body(
        answer, header_length=None if length is None else int(length)
    )
    _, _, generated = address.ask("v2/models/ensemble/generate", {"text_input": "once upon a time", "max_tokens": 12})
    assert result.as_numpy("text_output").ravel()[0].decode() == json.loads(generated)["text_output"]


def test_all_protocols_say_the_same(client: openai.OpenAI, address: Address) -> None:
    """Greedy, from the same ids."""
    ids = json.loads(address.ask("tokenize", {"prompt": "once upon a time"})[2])["tokens"]
    ours = json.loads(
        address.ask(address.predictions, {"prompt_token_ids": ids, "max_new_tokens": 15, "stream": False})[2]
    )["ids"]
    completion = client.completions.create(model=address.model, prompt=ids, max_tokens=15, temperature=0)
    text = json.loads(address.ask("detokenize", {"tokens": ours})[2])["prompt"]
    assert completion.choices[0].text.strip() == text.strip()
    generated = address.ask("v2/models/ensemble/generate", {"text_input": "once upon a time", "max_tokens": 15})[2]
    assert json.loads(generated)["text_output"].strip() == text.strip()


def test_no_prompt_is_logged(address: Address) -> None:
    secret = "quetzalcoatlus northropi"
    asked: list[tuple[str, Any]] = [
        (address.predictions, {"prompt": secret, "max_new_tokens": 2}),
        (address.predictions, {"prompt": secret, "top_p": secret}),
        ("v1/completions", {"model": address.model, "prompt": secret, "max_tokens": 2}),
        ("v1/chat/completions", {"messages": [{"role": "user", "content": secret}], "max_tokens": 2, "stream": True}),
        ("v1/chat/completions", {"messages": [{"role": secret, "content": secret}]}),
        ("v2/models/ensemble/generate", {"text_input": secret, "max_tokens": 2}),
        ("v2/models/ensemble/generate", {"text_input": secret, "beam_width": secret}),
        ("tokenize", {"prompt": secret}),
        ("tokenize", f'{{"prompt": "{secret}'.encode()),
    ]
    statuses = [address.ask(path, body)[0] for path, body in asked]
    assert statuses == [200, 400, 200, 200, 400, 200, 400, 200, 400]
    log = address.log.read_text()
    assert log
    assert "quetzalcoatlus" not in log.lower()


def test_live_and_ready(address: Address) -> None:
    for path in ("health/live", "health/ready", "health", "v2/health/live", "v2/health/ready"):
        assert address.ask(path)[0] == 200
    assert json.loads(address.ask("health/ready")[2])["status"] == "ready"


def test_a_grammar_that_cannot_be_used_is_its_own_requests_400(address: Address) -> None:
    asked = {"prompt": "a", "guided_regex": "[a-"}
    for _ in range(2):  # looked at, and remembered
        status, _, body = address.ask("v1/completions", asked)
        assert (status, json.loads(body)["error"]["param"]) == (400, "guided_regex")
    assert address.ask("v2/models/ensemble/generate", {"text_input": "a", "guided_regex": "[a-"})[0] == 400

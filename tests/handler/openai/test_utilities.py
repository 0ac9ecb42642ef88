"""Models, tokens, the version, and the OpenAPI document."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.handler.fakes import tokenizer
from tests.handler.openai.client import HELLO, MAX_SEQ_LEN, Client, ids_of, refusal
from tpserve.handler.openai import reply_schema
from tpserve.handler.openai.openapi import openapi
from tpserve.handler.routes import ENDPOINTS


def get(path: str, body: Any = None, client: Client | None = None) -> Any:
    reply = (client or Client()).ask(path, b"" if body is None else body)
    assert reply is not None
    assert (reply.status, reply.more) == (200, None)
    return json.loads(reply.body)


def test_models() -> None:
    client = Client()
    told = get("v1/models", client=client)
    reply_schema.ModelList.model_validate(told, strict=True)
    (model,) = told["data"]
    assert (model["id"], model["max_model_len"]) == ("llama", MAX_SEQ_LEN)
    assert get("v1/models/llama", client=client) == model
    told = refusal(client.ask("v1/models/gpt-4", b""))
    assert (told["status"], told["code"], told["param"]) == (404, "model_not_found", "model")


def test_the_version() -> None:
    assert get("version") == {"version": importlib.metadata.version("tpserve")}


def test_what_openai_has_and_we_have_not() -> None:
    told = refusal(Client().ask("v1/embeddings", {}))
    assert told["status"] == 404
    assert "v1/embeddings" in told["message"]


@pytest.mark.parametrize("special", [None, True, False])
def test_tokenize_a_prompt(special: bool | None) -> None:
    told = get("tokenize", {"prompt": "once upon", "add_special_tokens": special, "return_token_strs": True})
    reply_schema.Tokens.model_validate(told, strict=True)
    bos = special is not False
    ids = tokenizer().encode("once upon", bos=bos, eos=False)
    texts = ["<s>"] * bos + [" once", " upon"]
    assert told == {"count": len(ids), "max_model_len": MAX_SEQ_LEN, "tokens": ids, "token_strs": texts}


def test_tokenize_messages_as_a_chat_would() -> None:
    client = Client()
    told = get("tokenize", HELLO, client)
    client.ask("v1/chat/completions", HELLO)
    assert told["tokens"] == client.asked()[0]
    assert "token_strs" not in told


def test_there_and_back() -> None:
    text = "once upon a \u6771 time"
    ids = get("tokenize", {"prompt": text})["tokens"]
    assert get("detokenize", {"tokens": ids}) == {"prompt": text}
    assert get("detokenize", {"tokens": []}) == {"prompt": ""}


def test_without_a_tokenizer_there_are_no_tokens() -> None:
    client = Client()
    client.backend.tokenizer = None
    assert refusal(client.ask("tokenize", {"prompt": "one"}))["param"] == "prompt"
    assert refusal(client.ask("detokenize", {"tokens": ids_of("one")}))["param"] == "tokens"


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for child in value.values():
            yield from references(child)
    elif isinstance(value, list):
        for child in value:
            yield from references(child)


def test_the_document_says_what_there_is() -> None:
    document = get("openapi.json")
    assert document == openapi()
    assert document["openapi"] == "3.1.0"
    paths = {path.strip("/").replace("{model}", "") for path in document["paths"]}
    assert paths == {path for path, endpoint in ENDPOINTS.items()
                     if endpoint.__module__.startswith("tpserve.handler.openai")} - {"v1/"}  # fmt: skip
    schemas = document["components"]["schemas"]
    found = set(references(document))
    assert {ref.removeprefix("#/components/schemas/") for ref in found} <= {*schemas}
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert document["security"] == [{}, *({name: []} for name in document["components"]["securitySchemes"])]
    for operation in operations:
        assert {"200", "401", "503"} <= {*operation["responses"]}
        if "requestBody" in operation:
            assert {"400", "408", "413", "415"} <= {*operation["responses"]}
        for status, response in operation["responses"].items():
            assert response["description"]
            if status != "200":
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorReply"}


def test_the_document_knows_streams_ranges_and_words() -> None:
    document = openapi()
    ok = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert ok["text/event-stream"]["schema"]["x-event-data"] == {"$ref": "#/components/schemas/ChatChunk"}
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 128}
    assert fields["n"]["description"]
    assert document["components"]["schemas"]["ChatRequest"]["required"] == ["messages"]

"""Other people's files, served through TorchServe as they are: nothing is converted, and no rank count divides them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from torch import Tensor

from tests.helpers.foreign import hf_config, hf_weights, write_gguf, write_hf
from tests.helpers.plain import PlainLlama, log_softmax
from tests.helpers.plain_sampling import Tally, check
from tests.helpers.shards import random_weights
from tests.text.byte_level import llama3_json, write_folder
from tests.torchserve.conftest import running, written_config
from tests.torchserve.server import Server
from tpserve.engine.sampling_params import SamplingParams
from tpserve.handler.archive import archive

# SmolLM2's heads, 9 over 3, of which two ranks get 6 and 3; quantised rows come in blocks of 32.
PARAMS: dict[str, Any] = {
    "dim": 288, "n_layers": 2, "n_heads": 9, "n_kv_heads": 3, "multiple_of": 32, "norm_eps": 1e-5,
}  # fmt: skip
TEMPLATE = "{{ bos_token }}{% for m in messages %}({{ m.role }}) {{ m.content }}<|eot_id|>{% endfor %}(assistant)"
DIALOG = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "once upon a time"}]
MAX_NEW_TOKENS = 24

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer_json() -> dict[str, Any]:
    return llama3_json()


@pytest.fixture(scope="module")
def weights(tokenizer_json: dict[str, Any]) -> dict[str, Tensor]:
    rows = len(tokenizer_json["model"]["vocab"]) + len(tokenizer_json["added_tokens"])
    return random_weights(PARAMS, vocab_size=rows)


@pytest.fixture(scope="module")
def models(folder: Path, weights: dict[str, Tensor], tokenizer_json: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """What each model's files hold, by Meta's names."""
    return {
        "hf": write_hugging_face(folder / "hf", weights, tokenizer_json),
        "gguf": write_quantised(folder / "tiny.Q8_0.gguf", weights, tokenizer_json),
    }


def write_hugging_face(folder: Path, weights: dict[str, Tensor], tokenizer_json: dict[str, Any]) -> dict[str, Tensor]:
    write_hf(folder, hf_weights(weights, 32), hf_config(PARAMS, weights), num_files=2)
    settings = {"chat_template": TEMPLATE, "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    write_folder(folder, tokenizer_json, tokenizer_config=settings)
    return weights


def write_quantised(path: Path, weights: dict[str, Tensor], tokenizer_json: dict[str, Any]) -> dict[str, Tensor]:
    vocab = tokenizer_json["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer_json["added_tokens"]}
    controls = {token["id"] for token in tokenizer_json["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer_json["model"]["merges"]]
    text: dict[str, int | str | list[str] | list[int]] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in controls else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": vocab["<|begin_of_text|>"],
        "tokenizer.ggml.eos_token_id": vocab["<|end_of_text|>"],
        "tokenizer.chat_template": TEMPLATE,
    }
    return write_gguf(path, PARAMS, weights, "Q8_0", more=text)


@pytest.fixture(scope="module")
def server(folder: Path, models: dict[str, dict[str, Tensor]]) -> Iterator[Server]:
    store, config = folder / "foreign-store", written_config(folder / "foreign.yaml", dim=PARAMS["dim"])
    for name, path in (("hf", folder / "hf"), ("gguf", folder / "tiny.Q8_0.gguf")):
        archive(path, config, name, export_path=store, tensor_parallel_size=2)
    yield from running(Server(store, [f"{name}.mar" for name in models]))


@pytest.mark.parametrize("name", ["hf", "gguf"])
def test_a_chat_through_the_files_own_template(
    server: Server, models: dict[str, dict[str, Tensor]], tokenizer_json: dict[str, Any], name: str
) -> None:
    """Token for token what a plain network makes of the weights in the file, from the ids its template is for."""
    body = {"dialog": DIALOG, "max_new_tokens": MAX_NEW_TOKENS, "ignore_eos": True, "logprobs": True, "stream": False}
    answer = server.post(body, model=name).json
    library = Library.from_str(json.dumps(tokenizer_json))
    begin, end = (library.token_to_id(token) for token in ("<|begin_of_text|>", "<|eot_id|>"))

    def ids(text: str) -> list[int]:
        return list(library.encode(text, add_special_tokens=False).ids)

    prompt = [begin, *ids("(system) be brief"), end, *ids("(user) once upon a time"), end, *ids("(assistant)")]
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    plain, tally = PlainLlama(PARAMS, models[name]), Tally()
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, temperature=0.0, ignore_eos=True)
    logits = check(plain, params, prompt, answer["ids"], "length", tally, eos_id=-1, max_seq_len=512, tolerance=1e-4)
    expected = [log_softmax(logits)[len(prompt) - 1 + i, token] for i, token in enumerate(answer["ids"])]
    assert answer["logprobs"] == pytest.approx(expected, abs=1e-3)
    asked = {"messages": DIALOG, "max_tokens": MAX_NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    with server.request(
        "POST", "1.0/v1/chat/completions", json.dumps(asked).encode(), "application/json", name
    ) as response:
        chat = json.loads(response.read())
    assert chat["choices"][0]["message"]["content"] == answer["text"]
    assert chat["usage"]["prompt_tokens"] == len(prompt)
    assert server.blocks_in_use(name) == [0, 0]

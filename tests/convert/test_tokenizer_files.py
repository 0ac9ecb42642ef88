"""What a converted folder carries of its tokenizer, and what its model.json says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library

from tests.helpers.shards import TINY_PARAMS, write_fairscale_checkpoint
from tests.text.byte_level import llama3_json, llama3_model, write_folder
from tests.text.models import load
from tpserve.convert.convert import convert
from tpserve.convert.errors import ConvertError
from tpserve.convert.tokenizer import find_tokenizer, read_tokenizer_files
from tpserve.engine.text.load import checkpoint_tokenizer
from tpserve.model.checkpoint import CheckpointError, CheckpointInfo

LLAMA3 = load(llama3_model())


@pytest.fixture
def llama3(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    write_fairscale_checkpoint(folder, TINY_PARAMS | {"vocab_size": LLAMA3.vocab_size + 6}, mp=1)
    (folder / "tokenizer.model").write_bytes(llama3_model().read_bytes())
    return folder


def test_llama3s_ranks_come_along(llama3: Path, tmp_path: Path) -> None:
    out = convert(llama3, tmp_path / "out", progress=False)
    info = CheckpointInfo.read(out)
    assert (info.tokenizer, info.bos_token_id, info.eos_token_id) == ("tokenizer.model", LLAMA3.bos_id, LLAMA3.eos_id)
    assert info.end_ids == info.eos_token_ids == LLAMA3.end_ids
    assert "tokenizer.model" in (out / "manifest.json").read_text()
    served = checkpoint_tokenizer(out)
    assert served is not None
    assert served.pieces == LLAMA3.pieces


def test_a_hugging_face_folder_gets_a_json_of_the_ranks(llama3: Path, tmp_path: Path) -> None:
    out = convert(llama3, tmp_path / "out", progress=False, format="hf")
    library = Library.from_file(str(out / "tokenizer.json"))
    ids = LLAMA3.encode("the cat's 123\n", bos=True, eos=False)
    assert library.encode("the cat's 123\n").ids == ids
    assert library.encode("<|eot_id|>").ids == [LLAMA3.bos_id, LLAMA3.special_id("<|eot_id|>")]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == list(LLAMA3.end_ids)
    assert json.loads((out / "tokenizer_config.json").read_text())["bos_token"] == "<|begin_of_text|>"
    assert not (out / "tokenizer.model").exists()


def test_json_files_come_along(llama3: Path, tmp_path: Path) -> None:
    (llama3 / "tokenizer.model").unlink()
    others = {"tokenizer_config": {"chat_template": [{"name": "default", "template": "{{ eos_token }}"}]},
              "generation_config": {"eos_token_id": [3, 4]}}  # fmt: skip
    write_folder(llama3, llama3_json(), **others)
    (llama3 / "chat_template.jinja").write_text("{{ bos_token }}")
    out = convert(llama3, tmp_path / "out", progress=False)
    assert CheckpointInfo.read(out).tokenizer == "tokenizer.json"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (llama3 / name).read_bytes()
    served = checkpoint_tokenizer(out)
    assert served is not None
    assert served.chat_template == "{{ bos_token }}", "the file counts before tokenizer_config.json"
    assert {3, 4} <= set(served.end_ids) == set(CheckpointInfo.read(out).end_ids)
    (llama3 / "chat_template.jinja").unlink()
    found = read_tokenizer_files(llama3)
    assert found is not None
    assert found.chat_template == "{{ eos_token }}"


def test_the_file_that_knows_more_tokens_counts(tmp_path: Path) -> None:
    folder, content = tmp_path / "t", llama3_json()
    write_folder(folder, content)
    (folder / "tokenizer.model").write_bytes(llama3_model().read_bytes())
    for further, name in (([], "tokenizer.model"), ([{"id": 5000, "content": "<|x|>"}], "tokenizer.json")):
        write_folder(folder, content | {"added_tokens": content["added_tokens"] + further})
        found = read_tokenizer_files(folder)
        assert found is not None
        assert found.name == name


def test_ends_beyond_the_model_are_left_out(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "t", llama3_json(), generation_config={"eos_token_id": [5, 10**6]})
    found = find_tokenizer(folder, None, LLAMA3.vocab_size)
    assert found is not None
    assert 5 in found.eos_token_ids
    assert max(found.eos_token_ids) < LLAMA3.vocab_size
    with pytest.raises(ConvertError, match=r"tokenizer\.json has \d+ pieces"):
        find_tokenizer(folder, None, 300)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_config.json", b"[]", r"tokenizer_config\.json holds a JSON list"),
        ("generation_config.json", b"{", r"generation_config\.json is not JSON"),
        ("tokenizer.json", b"<html>", r"tokenizer\.json is an HTML page"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja is not UTF-8"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    folder = write_folder(tmp_path / "t", llama3_json())
    (folder / name).write_bytes(content)
    with pytest.raises(ConvertError, match=said):
        read_tokenizer_files(folder)


def test_a_model_json_of_an_older_release(llama3: Path, tmp_path: Path) -> None:
    out = convert(llama3, tmp_path / "out", progress=False)
    fields: dict[str, Any] = json.loads((out / "model.json").read_text())
    del fields["eos_token_ids"]
    (out / "model.json").write_text(json.dumps(fields))
    assert CheckpointInfo.read(out).end_ids == (LLAMA3.eos_id,)
    (out / "model.json").write_text(json.dumps(fields | {"eos_token_ids": [1, "x"]}))
    with pytest.raises(CheckpointError, match="eos_token_ids must be a list"):
        CheckpointInfo.read(out)

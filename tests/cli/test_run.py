"""`tpserve run` as users type it: prompts of every kind of file, and what it says at the end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import tpserve
from tests.helpers.data import shared_data, stories_reference
from tpserve.engine.errors import ConfigError
from tpserve.engine.text.load import load_tokenizer
from tpserve.engine.token_files import read_prompts, write_csv, write_npy


def test_one_prompt_as_metas_implementation_goes_on(tmp_path: Path) -> None:
    expected = stories_reference()["completions"][0]
    out = tpserve(
        "run", "--checkpoint", str(shared_data("stories260K") / "mp2"), "--tp", "2", "--device", "cpu",
        "--max_seq_len", "512", "--input_text", expected["prompt"], "--max_output_len",
        str(len(expected["logprobs"])), "--logprobs", "--json", str(tmp_path / "o.json"),
    )  # fmt: skip
    answer, _, table = out.rpartition("\n\n|")
    assert answer.rstrip("\n") == expected["text"].rstrip("\n")
    cells = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    assert cells[:3] == ["prompt", str(len(expected["prompt_ids"])), str(len(expected["logprobs"]))]
    (found,) = json.loads((tmp_path / "o.json").read_text())["figures"]["answers"]
    assert found["text"] == expected["text"]
    assert found["finish_reason"] == "length"
    assert len(found["ids"]) == len(found["logprobs"]) == len(expected["logprobs"])
    assert max(abs(a - b) for a, b in zip(found["logprobs"], expected["logprobs"], strict=True)) <= 2e-3
    figures = found["figures"]
    assert 0 < figures["ttft_ms"] < 1e3 * figures["total_s"]
    rate = (figures["output_tokens"] - 1) / (figures["total_s"] - figures["ttft_ms"] / 1e3)
    assert figures["tokens_per_s"] == pytest.approx(rate)


def test_prompts_of_a_file(demo: Path, tmp_path: Path) -> None:
    """The same prompt as text, as ids and in padded rows is one prompt; answers come in the order of the file."""
    ids = load_tokenizer(demo).encode("Once upon a time", bos=True, eos=False)
    lines = [
        {"prompt": "Once upon a time"},
        {"prompt_token_ids": ids[:3], "temperature": 1.0, "seed": 3, "n": 2},
        {"prompt_token_ids": ids},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tpserve(
        "run", "--checkpoint", str(demo), "--device", "cpu", "--input_file", str(tmp_path / "in.jsonl"),
        "--max_output_len", "6", "--ignore_eos", "--output_csv", str(tmp_path / "o.csv"), "--output_npy",
        str(tmp_path / "o.npy"),
    )  # fmt: skip
    rows = [[int(cell) for cell in line.split(",")] for line in (tmp_path / "o.csv").read_text().splitlines()]
    assert [len(row) for row in rows] == [6] * 4
    assert rows[0] == rows[3]
    assert rows[1] != rows[2]
    assert np.load(tmp_path / "o.npy").tolist() == rows
    assert out.index("Output 0:") < out.index("Output 1.0:") < out.index("Output 1.1:") < out.index("Output 2:")
    assert "| together (TTFT: median) |" in out


def test_files_are_read_as_tensorrt_llms(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [[1, 2, 3], [4]])
    assert (tmp_path / "a.csv").read_text() == "1,2,3\n4\n"
    expected = [{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": [4]}]
    assert read_prompts(tmp_path / "a.csv") == expected
    write_npy(tmp_path / "a.npy", [[1, 2, 3], [4]], 2)
    assert np.load(tmp_path / "a.npy").tolist() == [[1, 2, 3], [4, 2, 2]]
    assert read_prompts(tmp_path / "a.npy", {2}) == expected  # padding within a row is none
    np.save(tmp_path / "b.npy", np.array([-1, 7, 8, -1], dtype=np.int64))
    assert read_prompts(tmp_path / "b.npy") == [{"prompt_token_ids": [7, 8]}]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_prompts(tmp_path / "a.txt") == [{"prompt": "one"}, {"prompt": "two"}]
    assert read_prompts(tmp_path / "a.txt", whole_file=True) == [{"prompt": "one\n\ntwo\n"}]


def test_files_that_are_something_else_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2\n3,x\n")
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\nno\n')
    (tmp_path / "no.npy").write_bytes(b"no")
    np.save(tmp_path / "float.npy", np.zeros(3))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)  # would be code, if it were loaded
    np.save(tmp_path / "padding.npy", np.array([[5, 2], [2, 2]]))
    for name, said in {
        "a.csv": "line 2", "a.txt": "holds no prompt", "b.txt": "not UTF-8", "a.jsonl": "line 2 is not JSON",
        "no.npy": "no array", "float.npy": "must hold integers", "object.npy": "no array",
        "padding.npy": "row 1 is nothing but padding", "none.csv": "cannot be read", "a.pdf": "must end in",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            read_prompts(tmp_path / name, {2})


def test_mistakes_are_told(demo: Path) -> None:
    assert "error: give either input_text or input_file" in tpserve("run", str(demo), status=2)
    both = ("run", str(demo), "--input_text", "a")
    assert "did you mean 'temperature'" in tpserve(*both, "--temprature", "1", status=2)
    assert "error: beam_width must be from 1 to 64" in tpserve(*both, "--num_beams", "99", status=2)

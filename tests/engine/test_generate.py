"""Offline batches under torchrun: the real command, its order, its errors, and going on after an interruption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import PARAMS
from tests.helpers.data import shared_data, stories_reference
from tests.helpers.foreign import hf_config, hf_weights, write_hf
from tests.helpers.offline import generate_here
from tests.helpers.shards import random_weights
from tests.text.byte_level import llama3_json, write_folder
from tpserve.convert.convert import convert
from tpserve.engine.journal import Journal, digest
from tpserve.engine.text.load import load_tokenizer


def command(tp: int, checkpoint: Path, prompts: Path, out: Path, *options: str) -> list[str]:
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(tp), "--master-port", "0", "--standalone"]
    files = ["--checkpoint", str(checkpoint), "--prompts", str(prompts), "--out", str(out)]
    return [sys.executable, "-m", *torchrun, "-m", "tpserve.engine.generate", *files, "--device", "cpu", *options]


# Threads of several processes on few cores would wait for each other.
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def write_jsonl(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*args: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, check=False, timeout=120, env=ENV)


@pytest.mark.parametrize(("mp", "tp"), [(1, 1), (2, 2), (4, 3), pytest.param(4, 4, marks=pytest.mark.faults)])
def test_a_real_model_says_what_metas_implementation_says(mp: int, tp: int, tmp_path: Path) -> None:
    reference = stories_reference()
    folder = convert(shared_data("stories260K") / f"mp{mp}", tmp_path / "model", progress=False)
    lines = [{"prompt": c["prompt"], "max_new_tokens": len(c["logprobs"])} for c in reference["completions"]]
    n_chat = 60
    lines += [{"dialog": chat["dialog"], "max_new_tokens": n_chat} for chat in reference["chats"]]
    prompts = write_jsonl(tmp_path / "in.jsonl", lines * 3)  # batch-mates must not matter
    done = run(tp, folder, prompts, tmp_path / "out.jsonl", "--max_seq_len", "512", "--logprobs")
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
    results = read_jsonl(tmp_path / "out.jsonl")
    assert len(results) == len(lines) * 3
    n = len(lines)
    for i, expected in enumerate(reference["completions"]):
        for result in results[i::n]:
            assert result["text"] == expected["text"]
            assert result["usage"]["prompt_tokens"] == len(expected["prompt_ids"])
            assert len(result["ids"]) == len(result["logprobs"]) == len(expected["logprobs"])
            worst = max(abs(a - b) for a, b in zip(result["logprobs"], expected["logprobs"], strict=True))
            assert worst <= 2e-3
    for chat, result in zip(reference["chats"], results[len(reference["completions"]) :], strict=False):
        reply = chat["reply"]["content"]
        assert result["text"].startswith(reply) or reply.startswith(result["text"])


def test_lines_keep_their_order_and_bad_ones_their_place(tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts = write_jsonl(
        tmp_path / "in.jsonl",
        [
            {"prompt_token_ids": [5, 6], "max_new_tokens": 30, "ignore_eos": True},
            "not JSON",
            {"prompt_token_ids": [5, 6], "max_new_tokens": 2, "ignore_eos": True, "logprobs": True},
            {"prompt": "text, without a tokenizer"},
            {"prompt_token_ids": [7], "temperature": "hot"},
            {"prompt_token_ids": [999]},
            {"prompt_token_ids": list(range(3, 100))},
            {"prompt_token_ids": [8], "max_new_tokens": 3, "temperature": 1.0, "seed": 9, "ignore_eos": True},
        ],
    )
    out = tmp_path / "out.jsonl"
    generate_here(tiny_checkpoint, prompts, out, "--max_seq_len", "64")
    results = read_jsonl(out)
    assert results[0]["ids"][:2] == results[2]["ids"]
    assert results[0]["usage"] == {"prompt_tokens": 2, "completion_tokens": 30, "total_tokens": 32}
    assert results[0]["finish_reason"] == "length"
    assert results[0]["text"] is None
    assert len(results[2]["logprobs"]) == 2
    assert len(results[7]["ids"]) == 3
    fields = [result.get("error", {}).get("field", "served") for result in results]
    assert fields[:4] == ["served", None, "served", "prompt"]
    assert fields[4:] == ["temperature", "prompt_token_ids", "prompt_token_ids", "served"]
    assert not out.with_name("out.jsonl.partial").exists()


def test_several_answers_and_ends_that_are_found_in_the_text(tmp_path: Path) -> None:
    folder = convert(shared_data("stories260K") / "mp1", tmp_path / "model", progress=False)
    prompt = "Once upon a time"
    prompts = write_jsonl(
        tmp_path / "in.jsonl",
        [
            {"prompt": prompt, "temperature": 1.0, "seed": 3, "n": 2, "cum_log_probs": True},
            {"prompt": prompt, "max_tokens": 60},
            {"prompt": prompt, "max_tokens": 60, "stop": ["was", "."], "echo": True},
            {"prompt": prompt, "best_of": 3, "temperature": 1.0, "seed": 3},
            {"prompt": prompt, "n": 500},
            {"prompt": prompt, "timeout_s": 0.001, "max_tokens": 400, "ignore_eos": True},
        ],
    )
    out = tmp_path / "out.jsonl"
    generate_here(folder, prompts, out, "--max_seq_len", "512", "--max_new_tokens", "9", "--stop_token_ids", "500,501")
    two, plain, stopped, best, refused, late = read_jsonl(out)
    assert [choice["index"] for choice in two["choices"]] == [0, 1]
    assert all(len(c["ids"]) <= 9 and c["cumulative_logprob"] < 0 for c in two["choices"])
    assert two["choices"][0]["ids"] != two["choices"][1]["ids"]
    assert two["usage"]["completion_tokens"] == sum(len(choice["ids"]) for choice in two["choices"])
    whole = prompt + plain["text"] if plain["text"].startswith((" ", ",")) else f"{prompt} {plain['text']}"
    cut = min(at for stop in ("was", ".") if (at := whole.find(stop)) >= 0)
    assert (stopped["text"], stopped["finish_reason"]) == (whole[:cut], "stop")
    assert set(best) == {"text", "ids", "finish_reason", "usage"}
    assert refused["error"]["field"] == "n"
    assert late["finish_reason"] == "timeout"


def test_dialogs_go_through_the_checkpoints_own_template(tmp_path: Path) -> None:
    """As they do in a server: the same ids as the text that the template makes of them."""
    weights = random_weights(PARAMS | {"vocab_size": len(llama3_json()["model"]["vocab"]) + 256})
    write_hf(tmp_path / "hf", hf_weights(weights, 8), hf_config(PARAMS, weights))
    template = "{% for m in messages %}({{ m.role }}) {{ m.content }}<|eot_id|>{% endfor %}(assistant)"
    write_folder(tmp_path / "hf", llama3_json(), tokenizer_config={"chat_template": template})
    tokenizer = load_tokenizer(tmp_path / "hf")
    end = tokenizer.special_id("<|eot_id|>")
    assert end is not None
    first, second = (tokenizer.encode(text, bos=False, eos=False) for text in ("(user) once upon", "(assistant)"))
    lines = [{"dialog": [{"role": "user", "content": "once upon"}]}, {"prompt_token_ids": [*first, end, *second]}]
    prompts = write_jsonl(tmp_path / "in.jsonl", [line | {"max_new_tokens": 8, "ignore_eos": True} for line in lines])
    generate_here(tmp_path / "hf", prompts, tmp_path / "out.jsonl", "--max_seq_len", "64")
    by_template, by_ids = read_jsonl(tmp_path / "out.jsonl")
    assert by_template == by_ids
    assert by_template["usage"]["prompt_tokens"] == len(first) + len(second) + 1


def test_an_interrupted_batch_goes_on_where_it_was(tiny_checkpoint: Path, tmp_path: Path) -> None:
    lines = [{"prompt_token_ids": [3 + i], "max_new_tokens": 10 + 3 * i, "ignore_eos": True} for i in range(29)]
    prompts = write_jsonl(tmp_path / "in.jsonl", [*lines, "not JSON"])
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    options = ("--max_seq_len", "256", "--max_num_seqs", "4")
    process = subprocess.Popen(command(1, tiny_checkpoint, prompts, out, *options), stderr=subprocess.DEVNULL, env=ENV)
    deadline_s = time.monotonic() + 60
    while (not partial.exists() or partial.read_bytes().count(b"\n") < 8) and time.monotonic() < deadline_s:
        time.sleep(0.005)
    process.terminate()
    process.wait()
    assert not out.exists()
    kept = partial.read_bytes().count(b"\n")
    assert 8 <= kept < 30
    with partial.open("ab") as f:
        f.write(b'{"index": 29, "dig')  # a line that was being written
    done = run(1, tiny_checkpoint, prompts, out, *options)
    assert done.returncode == 0, done.stderr  # a bad line is answered in its place, and fails nothing else
    assert "error" in read_jsonl(out)[29]
    assert f"{kept} of 30 lines were finished before" in done.stderr
    generate_here(tiny_checkpoint, prompts, tmp_path / "whole.jsonl", *options)
    assert read_jsonl(out) == read_jsonl(tmp_path / "whole.jsonl")


def test_a_journal_of_another_input_is_not_believed(tmp_path: Path) -> None:
    old = [digest({"prompt": "a"}, 0), digest({"prompt": "b"}, 0)]
    with Journal(tmp_path / "out", old) as journal:
        journal.add(0, {"text": "A"})
        journal.add(1, {"text": "B"})
    with Journal(tmp_path / "out", [old[0], digest({"prompt": "c"}, 0)]) as journal:
        assert journal.results == {0: {"text": "A"}}
    with Journal(tmp_path / "out", [digest({"prompt": "a"}, 1)]) as journal:
        assert journal.results == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max_sek_len", "3"), "did you mean 'max_seq_len'"),
        (("--temprature", "1"), "did you mean 'temperature'"),
        (("--temperature", "-1"), "temperature"),
        (("--max_tokens", "0"), "max_tokens: max_new_tokens must be at least 1"),
        (("--stop", "x"), "no tokenizer"),
        (("--max_seq_len", "0"), "max_seq_len"),
        (("--tensor_parallel_size", "2"), "torchrun --nproc-per-node 2"),
    ],
)
def test_wrong_options_are_explained(
    tiny_checkpoint: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = write_jsonl(tmp_path / "in.jsonl", [{"prompt_token_ids": [3]}])
    with pytest.raises(SystemExit) as ended:
        generate_here(tiny_checkpoint, prompts, tmp_path / "out.jsonl", *options)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said

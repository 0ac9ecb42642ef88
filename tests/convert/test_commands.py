"""The two commands: their flags, exit codes and messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpserve.convert.manifest import verify_manifest
from tpserve.model.checkpoint import CheckpointInfo


def run(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=os.environ | env)


def test_convert_command(ckpt: Path, tmp_path: Path, tokenizer_model: bytes) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer_model)
    flags = ["--ckpt_dir", ckpt, "--out_dir", "7", "--tokenizer_path", tmp_path / "t.model", "--dtype", "bf16"]
    command = [sys.executable, "-m", "tpserve.convert", *map(str, flags)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert f"converted to {tmp_path / '7'}" in done.stderr
    verify_manifest(tmp_path / "7")
    info = CheckpointInfo.read(tmp_path / "7")
    assert (info.dtype, info.tokenizer) == ("bfloat16", "tokenizer.model")


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("tpserve.convert", ["--ckpt_dir", "{0}", "--out_dir", "{1}"]),
        ("tpserve.convert.convert_checkpoints", ["--original_ckpt_dir", "{0}", "--save_checkpoint_dir", "{1}"]),
    ],
)
def test_error_is_one_line_and_exit_2(ckpt: Path, tmp_path: Path, module: str, flags: list[str]) -> None:
    (ckpt / "params.json").write_text('{"dim": 0, "n_layers": 2, "n_heads": 4}')
    done = run(module, *(flag.format(ckpt, tmp_path / "out") for flag in flags))
    assert done.returncode == 2
    assert done.stderr == f"error: {ckpt / 'params.json'}: dim must be a positive integer, got 0\n"
    assert not (tmp_path / "out").exists()


def old_command(ckpt: Path, out: Path, n: int) -> list[object]:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", n, "-m"]
    flags = ["--original_ckpt_dir", ckpt, "--save_checkpoint_dir", out, "--tokenizer_path", ckpt / "tokenizer.model"]
    limits = ["--model_parallel_size", n, "--max_seq_len", 128, "--max_batch_size", 3]
    return [*torchrun, "tpserve.convert.convert_checkpoints", *flags, *limits]


def test_the_old_examples_command_under_torchrun(ckpt: Path, tmp_path: Path, tokenizer_model: bytes) -> None:
    (ckpt / "tokenizer.model").write_bytes(tokenizer_model)
    done = run(*old_command(ckpt, tmp_path / "out", 2), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    verify_manifest(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model_args.json").read_text()) == {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 90,
        "multiple_of": 4,
        "ffn_dim_multiplier": None,
        "norm_eps": 1e-5,
        "max_seq_len": 128,
        "max_batch_size": 3,
        "model_parallel_size": 2,
    }


def test_failure_of_rank_0_fails_torchrun(ckpt: Path, tmp_path: Path, tokenizer_model: bytes) -> None:
    (ckpt / "tokenizer.model").write_bytes(tokenizer_model)
    done = run(*old_command(ckpt, tmp_path / "out", 3), OMP_NUM_THREADS="1")
    assert done.returncode != 0
    assert "error: --model_parallel_size is 3, but" in done.stderr
    assert not (tmp_path / "out").exists()

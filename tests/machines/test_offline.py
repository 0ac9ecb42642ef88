"""An offline batch over two machines says what it says on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.offline import generate_here
from tests.helpers.shards import write_fairscale_checkpoint
from tests.machines.namespaces import ADDRESSES, environment, missing, two_machines
from tpserve.convert.convert import convert

OPTIONS = ("--max_new_tokens", "24", "--max_seq_len", "128")
REASON = missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def command(folder: Path, out: Path, *torchrun: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", *torchrun, "-m", "tpserve.engine.generate",
        "--checkpoint", str(folder / "out"), "--prompts", str(folder / "in.jsonl"), "--out", str(out),
        "--device", "cpu", *OPTIONS,
    ]  # fmt: skip


def ids(path: Path) -> list[list[int]]:
    return [json.loads(line)["ids"] for line in path.read_text().splitlines()]


@pytest.mark.timeout(600)
def test_two_machines(tmp_path: Path) -> None:
    write_fairscale_checkpoint(tmp_path / "in", mp=2)
    convert(tmp_path / "in", tmp_path / "out", progress=False)
    lines = [
        {"prompt_token_ids": [3 + i, 5, 7], "ignore_eos": True, "seed": i, "temperature": i % 2} for i in range(6)
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    generate_here(tmp_path / "out", tmp_path / "in.jsonl", tmp_path / "alone.jsonl", *OPTIONS)
    with two_machines() as machines:
        ranks = [
            subprocess.Popen(
                [
                    *machine, *command(
                        tmp_path, tmp_path / "together.jsonl", "--nnodes", "2", "--nproc-per-node", "1",
                        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29471", "--rdzv-id", "7",
                        "--local-addr", address, "--rdzv-conf", f"is_host={address == ADDRESSES[0]}",
                    )
                ],
                env=environment(),
            )
            for machine, address in zip(machines, ADDRESSES, strict=True)
        ]  # fmt: skip
        try:
            assert [rank.wait(300) for rank in ranks] == [0, 0]
        finally:
            for rank in ranks:
                rank.kill()
    assert ids(tmp_path / "together.jsonl") == ids(tmp_path / "alone.jsonl")
    assert [len(line) for line in ids(tmp_path / "together.jsonl")] == [24] * 6

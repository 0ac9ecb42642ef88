"""The network over real gloo ranks: equal logits at every TP size, and no collective beyond the plan's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.workers import collectives, fairscale_checkpoint, two_steps
from tests.helpers.data import shared_data
from tests.helpers.ranks import run_ranks
from tests.helpers.shards import TINY_PARAMS, write_fairscale_checkpoint
from tpserve.convert.convert import convert

TOKENS = [1, 5, 17, 80, 33, 2, 64, 9, 41]
# Eight query heads, two KV heads, an FFN (88) that 8 divides and a vocabulary (90) that neither 4 nor 8 does.
WIDE = TINY_PARAMS | {"dim": 32, "n_heads": 8, "n_kv_heads": 2, "n_layers": 3}


def run_two_steps(folder: Path, tmp_path: Path, tp: int, tokens: list[int], dtype: str = "float32") -> dict[str, Any]:
    out = tmp_path / f"tp{tp}-{dtype}.pt"
    arguments = (tp, str(tmp_path / f"store{tp}{dtype}"), str(folder), tokens, str(out), dtype)
    if tp == 1:
        two_steps(0, *arguments)
    else:
        run_ranks(two_steps, arguments, nprocs=tp)
    result: dict[str, Any] = torch.load(out, weights_only=True)
    return result


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_fairscale_checkpoint(folder / "in", WIDE, mp=2)
    return convert(folder / "in", folder / "out", progress=False)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_logits_do_not_depend_on_the_tp_size(wide: Path, tmp_path: Path, tp: int) -> None:
    alone = run_two_steps(wide, tmp_path, 1, TOKENS)
    together = run_two_steps(wide, tmp_path, tp, TOKENS)
    assert together["logits"].shape == (len(TOKENS), WIDE["vocab_size"])
    torch.testing.assert_close(together["logits"], alone["logits"], atol=2e-5, rtol=0)
    assert not alone["counts"]


def test_a_step_has_two_all_reduces_a_layer_and_one_gather(wide: Path, tmp_path: Path) -> None:
    counts = run_two_steps(wide, tmp_path, 2, TOKENS)["counts"]
    reduces = {op: n for op, n in counts.items() if "reduce" in op}
    gathers = {op: n for op, n in counts.items() if "gather" in op}
    assert sum(reduces.values()) == 2 * WIDE["n_layers"]
    assert sum(gathers.values()) == 1
    assert len(counts) == len(reduces) + len(gathers), counts


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(wide: Path, tmp_path: Path, dtype: str) -> None:
    exact = run_two_steps(wide, tmp_path, 1, TOKENS)["logits"]
    for tp in (1, 2):
        logits = run_two_steps(wide, tmp_path, tp, TOKENS, dtype)["logits"]
        assert logits.dtype == torch.float32
        error = (logits - exact).norm() / exact.norm()
        assert 0 < error < (0.03 if dtype == "bfloat16" else 0.004)


def test_collectives(tmp_path: Path) -> None:
    run_ranks(collectives, (3, str(tmp_path / "store"), "float32,float16,bfloat16"), nprocs=3)


def test_shards_of_fairscales_own_layers_give_fairscales_own_logits(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    run_ranks(fairscale_checkpoint, (2, str(tmp_path / "store"), str(source), TINY_PARAMS, 88, TOKENS), nprocs=2)
    expected = torch.load(source / "logits.pt", weights_only=True)
    (source / "logits.pt").unlink()
    folder = convert(source, tmp_path / "out", progress=False)
    for tp in (1, 2):
        logits = run_two_steps(folder, tmp_path, tp, TOKENS)["logits"]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_eight_ranks_of_a_real_model_with_four_kv_heads_and_a_width_that_8_does_not_divide(tmp_path: Path) -> None:
    folder = convert(shared_data("stories260K") / "mp4", tmp_path / "out", progress=False)
    tokens = [1, 403, 407, 261, 378]
    alone, eight = (run_two_steps(folder, tmp_path, tp, tokens)["logits"] for tp in (1, 8))
    torch.testing.assert_close(eight, alone, atol=2e-5, rtol=0)

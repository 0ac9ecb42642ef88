"""Decode graphs beside the plain network: the same logits, nothing written for padding, the same bits every time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.gpu.conftest import SEED
from tests.gpu.decoder_setup import BLOCK, SHAPES, Setup, check_captures, check_logits
from tpserve.model.args import ModelArgs
from tpserve.model.decoder import FusedDecoder, default_buckets
from tpserve.model.llama import TransformerBlock
from tpserve.model.parallel import TensorParallel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]


def one_rank(shape: str, buckets: Sequence[int]) -> Setup:
    return Setup(SHAPES[shape], TensorParallel(), buckets)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_logits(shape: str) -> None:
    check_logits(one_rank(shape, [1, 2, 8, 16, 32, 64]), [1, 2, 3, 8, 13, 32, 50, 64])


@pytest.mark.parametrize("shape", [(4096, 32, 8, 11008), (1280, 20, 4, 3456)])
def test_int4_at_real_widths(shape: tuple[int, int, int, int]) -> None:
    """Several steps a tile, the last of them short, and more tiles a program than its ring holds steps."""
    dim, heads, kv_heads, ffn = shape
    setup = Setup(ModelArgs(dim, 1, heads, kv_heads, 512, ffn), TensorParallel(), [1], quantization="int4")
    check_logits(setup, [1])


def test_tens_of_sequences_at_real_widths() -> None:
    """Products are `rows_product.py`'s: two of a layer leave sums in parts, two end with what follows."""
    args, sizes = ModelArgs(4096, 1, 32, 8, 512, 11008), [13, 32, 50, 70]
    check_logits(Setup(args, TensorParallel(), [16, 32, 64, 128]), sizes)
    check_captures(Setup(args, TensorParallel(), [16, 32, 64, 128]), sizes)


@pytest.mark.parametrize("n", [1, 3, 7, 40])
def test_writes_the_new_keys_and_values_and_nothing_else(n: int) -> None:
    setup = one_rank("wide", [1, 4, 8, 64])
    before = setup.contents()
    setup.decoder.capture(min(bucket for bucket in setup.decoder.buckets if bucket >= n))
    assert all(torch.equal(a, b) for a, b in zip(before, setup.contents(), strict=True)), (
        "a capture wrote into the cache"
    )
    rows, positions = setup.batch(n)
    setup.decoder(rows, positions)
    slots = setup.tables_RB[rows, positions // BLOCK] * BLOCK + positions % BLOCK
    fused = setup.contents()
    setup.plain(rows, positions)
    for was, now, plain in zip(before, fused, setup.contents(), strict=True):
        changed = (was != now).flatten(1).any(1).nonzero().flatten()
        assert changed.tolist() == sorted(slots.tolist())
        torch.testing.assert_close(now[slots], plain[slots], atol=0.1, rtol=0.05)


@pytest.mark.parametrize("n", [1, 3, 8, 40])
def test_draws_the_most_probable_tokens(n: int) -> None:
    setup = one_rank("odd", [1, 4, 8, 64])
    rows, positions = setup.batch(n)
    given = setup.tokens_RL.clone()
    for _ in range(2):  # without a graph, then with it
        setup.tokens_RL.copy_(given)
        expected = setup.decoder(rows, positions).argmax(-1)
        assert torch.equal(setup.decoder.step.draws.drawn_S[:n], expected)
        given_and_drawn = given.clone()
        given_and_drawn[rows, positions + 1] = expected
        assert torch.equal(setup.tokens_RL, given_and_drawn)
        setup.decoder.capture(min(bucket for bucket in setup.decoder.buckets if bucket >= n))


def test_draws_by_number_among_equals_and_not_for_padding() -> None:
    from tpserve.model.kernels.draw import GreedyDraws

    V, S = 5003, 6
    tokens_RL = torch.zeros(9, 20, dtype=torch.int64, device="cuda")
    draws = GreedyDraws(8, tokens_RL)
    generator = torch.Generator("cuda").manual_seed(SEED)
    rows, positions = torch.tensor([[4, 0, 8, 3, 1, 6], [0, 19, 5, -1, 3, 2]], device="cuda")
    for scale in (1.0, 4.0):  # many equal ones, fewer
        logits = (torch.randn(S, V, device="cuda", generator=generator) * scale).round()
        logits[1] = -torch.inf
        logits[2] = -0.0
        logits[2, 3000] = 0.0
        logits[4] = -logits[4].abs() - 1
        logits[5, 4000:] = torch.inf
        tokens_RL.zero_()
        expected = logits.argmax(-1)
        expected[3] = 0
        for _ in range(3):
            assert torch.equal(draws(logits, rows, positions), expected)
        written = torch.zeros_like(tokens_RL)
        there = positions >= 0
        written[rows[there], positions[there]] = expected[there]
        assert torch.equal(tokens_RL, written)


def test_the_same_bits_in_every_replay_and_beside_any_others() -> None:
    setup = one_rank("wide", [1, 2, 4, 8, 16, 64])
    for bucket in setup.decoder.buckets:
        setup.decoder.capture(bucket)
    rows, positions = setup.batch(8)
    together = setup.decoder(rows, positions).clone()
    for n in (8, 7, 4, 3, 2):  # buckets up to 8 do the same sums
        for _ in range(20):
            assert torch.equal(setup.decoder(rows[:n], positions[:n]), together[:n])
    for n in (1, 16, 64):
        batch = setup.batch(n)
        first = setup.decoder(*batch).clone()
        assert all(torch.equal(setup.decoder(*batch), first) for _ in range(20))


def test_the_modules_keep_views_of_the_joined_weights() -> None:
    setup = one_rank("wide", [1])
    block = setup.model.layers[0]
    assert isinstance(block, TransformerBlock)
    pieces = [block.attention.wq, block.attention.wk, block.attention.wv]
    assert len({piece.weight.untyped_storage().data_ptr() for piece in pieces}) == 1
    assert block.feed_forward.w1.weight.untyped_storage().data_ptr() == (
        block.feed_forward.w3.weight.untyped_storage().data_ptr()
    )


def test_a_graph_gives_the_bits_of_the_steps_before_it() -> None:
    setup = one_rank("wide", [1, 4, 8, 64])
    check_captures(setup, [1, 3, 8, 40])


def test_fits_and_supports() -> None:
    setup = one_rank("wide", [1, 4])
    assert FusedDecoder.supports(setup.model, setup.device)
    assert not FusedDecoder.supports(setup.model, torch.device("cpu"))
    assert [n for n in range(1, 6) if setup.decoder.fits(n)] == [1, 2, 3, 4]
    assert default_buckets(1) == [1]
    assert default_buckets(20) == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.timeout(900)
def test_ranks(ranks: int) -> None:
    """Logits on several ranks, and exchanges in a hurry."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    script = str(Path(__file__).with_name("ranks.py"))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_exchanges_alone() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    script = str(Path(__file__).with_name("exchanges.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", script, "3000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

"""Decode graphs beside the plain network: the same logits, nothing written for padding, the same bits every time.

Run by `python -m torch.distributed.run` this file is one rank of the tests that need several.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.gpu.conftest import SEED
from tpserve.model.args import ModelArgs
from tpserve.model.attention import PagedAttention, SequenceSlice
from tpserve.model.decoder import FusedDecoder, default_buckets
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama
from tpserve.model.parallel import TensorParallel, num_kv_heads, shard
from tpserve.model.quantized import quantize
from tpserve.model.rope import rope_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]
ROWS, MAX_LEN, BLOCK = 72, 320, 16
# The second has shapes that no tile divides: feed-forward 344 (176 and 168 on two ranks) and 515 tokens.
SHAPES = {
    "wide": ModelArgs(512, 2, 4, 4, 512, 1024),
    "odd": ModelArgs(256, 3, 8, 2, 515, 344),
}


class Setup:
    """A random model whose cache holds random keys and values for `ROWS` sequences, and its decoder."""

    def __init__(self, args: ModelArgs, tp: TensorParallel, buckets: Sequence[int], quantization: str = "") -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        with torch.device("meta"):
            model = Llama(args, MAX_LEN).to(torch.bfloat16)
        shard(model, tp)
        model.to_empty(device=device)
        model.rope_PC2 = rope_table(args, MAX_LEN, device)
        shared, own = (torch.Generator(device).manual_seed(SEED + seed) for seed in (7, 100 + tp.rank))
        for name, parameter in model.named_parameters():
            mean, std = (1, 0.1) if parameter.ndim == 1 else (0, 0.06)
            parameter.data.normal_(mean, std, generator=shared if "norm" in name or "tok" in name else own)
        if quantization:
            quantize(model, quantization)
        blocks = ROWS * MAX_LEN // BLOCK
        self.cache = PagedKVCache(
            args.n_layers, blocks, BLOCK, num_kv_heads(args, tp), args.head_dim,
            dtype=torch.bfloat16, device=device,
        )  # fmt: skip
        for tensor in (*self.cache.k, *self.cache.v):
            tensor.normal_(generator=own)
        seeded = torch.Generator().manual_seed(SEED + 3)
        self.tokens_RL = torch.randint(args.vocab_size, (ROWS, MAX_LEN), generator=seeded).to(device)
        self.tables_RB = torch.randperm(blocks, generator=seeded).view(ROWS, -1).to(device)
        self.model, self.device = model, device
        from tpserve.model.kernels.row_exchange import RowExchange  # these need Triton
        from tpserve.model.share_exchange import ShareExchange

        kinds = ((RowExchange, 1024), (ShareExchange, 4096))
        self.exchanges = tuple(kind.make(tp, rows, args.dim, torch.bfloat16, device) for kind, rows in kinds)
        self.decoder = FusedDecoder(
            model, self.cache, tp, self.tokens_RL, self.tables_RB, max_num_seqs=ROWS, buckets=buckets
        )  # fmt: skip

    def batch(self, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Random rows, each once, at random positions."""
        generator = torch.Generator().manual_seed(SEED + seed)
        positions = torch.randint(MAX_LEN, (n,), generator=generator)
        return torch.randperm(ROWS, generator=generator)[:n].to(self.device), positions.to(self.device)

    @torch.no_grad()
    def plain(self, rows_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        lens = [position + 1 for position in positions_N.tolist()]
        attend = PagedAttention(self.cache, self.tables_RB, rows_N, positions_N, lens, [])
        logits: torch.Tensor = self.model(self.tokens_RL[rows_N, positions_N], positions_N, attend)
        return logits

    def to_float32(self) -> None:
        self.model.float()
        self.cache.k, self.cache.v = ([t.float() for t in ts] for ts in (self.cache.k, self.cache.v))

    def contents(self) -> list[torch.Tensor]:
        return [t.clone() for t in (*self.cache.k, *self.cache.v)]

    def restore(self, contents: list[torch.Tensor]) -> None:
        for tensor, value in zip((*self.cache.k, *self.cache.v), contents, strict=True):
            tensor.copy_(value)


def check_logits(setup: Setup, sizes: Sequence[int]) -> None:
    """The decoder is no further from float32 than the plain network in bfloat16."""
    outputs = {}
    before = setup.contents()  # a batch's new keys may stand in another batch's past
    for n in sizes:
        setup.decoder.capture(min(bucket for bucket in setup.decoder.buckets if bucket >= n))
        batch = setup.batch(n, seed=n)
        setup.restore(before)
        outputs[n] = (setup.decoder(*batch).clone(), setup.plain(*batch))
    setup.to_float32()
    for n, (fused, plain) in outputs.items():
        setup.restore(before)
        reference = setup.plain(*setup.batch(n, seed=n))
        fused_error, plain_error = ((x - reference).norm() / reference.norm() for x in (fused, plain))
        assert fused_error < 1.1 * plain_error, f"{n} sequences: {fused_error:.4f}, the plain network {plain_error:.4f}"
        assert plain_error < 0.03


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
    pieces = [block.attention.wq, block.attention.wk, block.attention.wv]
    assert len({piece.weight.untyped_storage().data_ptr() for piece in pieces}) == 1
    assert block.feed_forward.w1.weight.untyped_storage().data_ptr() == (
        block.feed_forward.w3.weight.untyped_storage().data_ptr()
    )


def test_a_graph_gives_the_bits_of_the_steps_before_it() -> None:
    setup = one_rank("wide", [1, 4, 8, 64])
    check_captures(setup, [1, 3, 8, 40])


def check_captures(setup: Setup, sizes: Sequence[int]) -> None:
    """Steps before and after their capture are alike; what is captured is what was asked for."""
    decoder = setup.decoder
    batches = [setup.batch(n, seed=n) for n in sizes]
    contents, before = setup.contents(), []
    for batch in batches:
        setup.restore(contents)  # a batch's new keys may stand in another batch's past
        before.append(decoder(*batch).clone())
    assert decoder.missing == decoder.buckets
    assert decoder.wanted == min(bucket for bucket in decoder.buckets if bucket >= sizes[-1])
    decoder.capture(decoder.wanted)
    assert decoder.wanted is None
    for bucket in decoder.missing:
        decoder.capture(bucket)
    assert not decoder.missing
    for batch, logits in zip(batches, before, strict=True):
        setup.restore(contents)
        assert torch.equal(decoder(*batch), logits), f"{len(batch[0])} sequences"
    assert decoder.wanted is None


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
    """Logits on several ranks, and exchanges in a hurry; TPSERVE_SOAK_EXCHANGES sets how many (10⁶: 83 s)."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", __file__]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_exchanges_alone() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    script = str(Path(__file__).with_name("exchanges.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", script, "3000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def few(setup: Setup) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches whose sums go as words, each with rows of its own."""
    sizes = [1, 3, 8] * 3
    rows = setup.batch(ROWS)[0].split([*sizes, ROWS - sum(sizes)])
    return [(rows[i], setup.batch(n, seed=i)[1]) for i, n in enumerate(sizes)]


def soak(setup: Setup, tp: TensorParallel, exchanges: int, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Many steps on ranks that fall behind in turn: whoever read what belongs to another exchange would see other
    logits."""
    for _ in range(3):  # a batch may change another's past, until all have been there
        first = [setup.decoder(*batch).clone() for batch in batches]
    for logits in first:
        whole = [torch.empty_like(logits) for _ in range(tp.size)]
        dist.all_gather(whole, logits)
        assert all(torch.equal(other, logits) for other in whole), "the ranks' logits differ"
    wrong = torch.zeros((), dtype=torch.int64, device=setup.device)
    generator = torch.Generator().manual_seed(SEED + tp.rank)
    per_step = 2 * len(setup.model.layers) + 1
    for step in range(exchanges // per_step):
        i = step * 5 % len(batches)  # neighbours in time differ in tokens and in size
        if step % 16 == 0:
            torch.cuda._sleep(int(torch.randint(200_000, (), generator=generator)))
        if step % 1000 == 0:
            time.sleep(float(torch.rand((), generator=generator)) / 100)
        wrong += (setup.decoder(*batches[i]) != first[i]).any()
    assert not wrong.item(), f"{wrong.item()} steps differed"


class MixedStep:
    """Eight sequences that decode and `chunks` prompts of 41 tokens; the fused network's logits and the plain one's."""

    def __init__(self, setup: Setup, tp: TensorParallel, chunks: int) -> None:
        from tpserve.model.fused_forward import Chunks, FusedForward

        one, chunk = torch.arange(8), torch.arange(8, 8 + chunks)
        contexts = chunk * 13 % 200
        rows = torch.cat([one, chunk.repeat_interleave(41)]).to(setup.device)
        after = contexts[:, None] + torch.arange(41)
        positions = torch.cat([one * 30 + 5, after.flatten()]).to(setup.device)
        starts = (8 + 41 * torch.arange(chunks + 1)).to(setup.device)
        asked = torch.cat([one.to(setup.device), starts[1:] - 1])
        attend = PagedAttention(
            setup.cache, setup.tables_RB, rows, positions, (one * 30 + 6).tolist(),
            [SequenceSlice(context, 41) for context in contexts.tolist()],
        )  # fmt: skip
        inputs = setup.tokens_RL[rows, positions]
        forward = FusedForward(
            setup.model, setup.decoder.step.layers, setup.cache, tp, setup.tables_RB, *setup.exchanges
        )  # fmt: skip
        cut = Chunks(chunk.to(setup.device), starts, contexts.to(setup.device))
        self.plain = lambda: setup.model(inputs, positions, attend, asked)
        self.before = setup.contents()
        with torch.no_grad():
            self.fused = forward(inputs, rows, positions, 8, cut, asked).contiguous()
            for _ in range(3):
                assert torch.equal(forward(inputs, rows, positions, 8, cut, asked), self.fused)
            self.half = self.plain()
        every = [torch.empty_like(self.fused) for _ in range(tp.size)]
        dist.all_gather(every, self.fused)
        assert all(torch.equal(other, self.fused) for other in every), f"{chunks} chunks: the ranks differ"

    @torch.no_grad()
    def check(self, setup: Setup) -> None:
        """Against float32, to which model and cache have been turned."""
        assert setup.cache.k[0].dtype == torch.float32
        setup.restore(self.before)
        reference = self.plain()
        fused, plain = ((x - reference).norm() / reference.norm() for x in (self.fused, self.half))
        assert fused < 1.2 * plain, f"{fused:.4f}, the plain network {plain:.4f}"
        assert plain < 0.05


def int4_by_streams(tp: TensorParallel) -> None:
    """One sequence of an int4 model by `stream.py`: as near to float32 as the plain network, the ranks all alike."""
    from tpserve.model.kernels import has_gluon
    from tpserve.model.kernels.tiles import Stream

    args = dataclasses.replace(SHAPES["wide"], ffn_hidden_dim=1536)  # of which each of four ranks has whole groups
    setup = Setup(args, tp, [1, 4], quantization="int4")
    if has_gluon():
        assert isinstance(setup.decoder.step.tiles[1].down, Stream)
    for bucket in setup.decoder.buckets:
        setup.decoder.capture(bucket)
    for seed in range(10):
        logits = setup.decoder(*setup.batch(1, seed)).clone()
        every = [torch.empty_like(logits) for _ in range(tp.size)]
        dist.all_gather(every, logits)
        assert all(torch.equal(other, logits) for other in every), "int4: the ranks differ"
    check_logits(setup, [1, 3])
    setup.decoder.close()


def rank_main() -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    tp = TensorParallel.from_world()
    for shape in SHAPES:
        if SHAPES[shape].ffn_hidden_dim % (8 * tp.size) and tp.size > 2:
            continue
        setup = Setup(SHAPES[shape], tp, [1, 4, 8, 16, 32, 64, 72])
        assert setup.decoder.step.exchanges_words
        assert setup.decoder.step.exchanges_rows
        check_captures(setup, [1, 3, 8, 20, 50, 70])
        for n in (1, 3, 8, 20, 50, 70):
            logits = setup.decoder(*setup.batch(n)).clone()
            every = [torch.empty_like(logits) for _ in range(tp.size)]
            dist.all_gather(every, logits)
            assert all(torch.equal(other, logits) for other in every), f"{n} sequences: the ranks differ"
            # Logits are gathered, and so are alike whatever a rank has; what they are made of must be, too.
            normed = setup.decoder.step.normed[:n].clone()
            whole = [torch.empty_like(normed) for _ in range(tp.size)]
            dist.all_gather(whole, normed)
            assert all(torch.equal(other, normed) for other in whole), f"{n} sequences: the ranks' activations differ"
        # Of the second, no number of ranks divides the tokens.
        mixed = [MixedStep(setup, tp, chunks) for chunks in (10, 63)]
        with pytest.MonkeyPatch.context() as patch:  # products in parts, as of larger models
            patch.setattr("tpserve.model.share_exchange._MIN_TILES", 0)
            mixed.append(MixedStep(setup, tp, 63))
        setup.exchanges = (None, None)  # by NCCL
        mixed += [MixedStep(setup, tp, chunks) for chunks in (10, 63)]
        check_logits(setup, [1, 3, 8, 20, 50, 70])
        for step in mixed:
            step.check(setup)
        setup.decoder.close()
    int4_by_streams(tp)
    exchanges = int(os.environ.get("TPSERVE_SOAK_EXCHANGES", "20000"))
    deep = Setup(
        dataclasses.replace(SHAPES["wide"], n_layers=24), tp, [1, 4, 8, 66, 67, 72]
    )  # graphs of 49 exchanges each
    for bucket in deep.decoder.buckets:
        deep.decoder.capture(bucket)
    soak(deep, tp, exchanges, few(deep))
    soak(deep, tp, exchanges, [deep.batch(n, seed=n) for n in (66, 72, 67)])  # by `row_exchange.py`
    deep.decoder.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    rank_main()

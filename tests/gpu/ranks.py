"""One rank of those that compute together, for `test_decoder.py`: `torchrun --nproc-per-node 2 tests/gpu/ranks.py`.

TPSERVE_SOAK_EXCHANGES sets how many exchanges are made in a hurry (10⁶: 83 s).
"""

from __future__ import annotations

import dataclasses
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.gpu.conftest import SEED
from tests.gpu.decoder_setup import ROWS, SHAPES, Setup, check_captures, check_logits
from tpserve.model.attention import PagedAttention, SequenceSlice
from tpserve.model.parallel import TensorParallel, without_multicast


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
            self.fused = forward(inputs, rows, positions, positions[:8], cut, asked).contiguous()
            for _ in range(3):
                assert torch.equal(forward(inputs, rows, positions, positions[:8], cut, asked), self.fused)
            self.half = self.plain()
            all_logits = forward(inputs, rows, positions, positions[:8], cut, None)
        assert not torch.equal(all_logits, all_logits.bfloat16().float()), "rounded"
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


def without_memory_on_one(tp: TensorParallel) -> None:
    """Where one rank has no memory for a graph, none has a graph; and they go on."""
    setup = Setup(SHAPES["wide"], tp, [4, 16])
    enqueue = setup.decoder.step.enqueue

    def short_of_memory(bucket: int) -> None:
        enqueue(bucket)
        if tp.rank == tp.size - 1 and torch.cuda.is_current_stream_capturing():
            raise torch.cuda.OutOfMemoryError("no more")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup.decoder.step, "enqueue", short_of_memory)
        for bucket in setup.decoder.buckets:
            setup.decoder.capture(bucket)
    assert setup.decoder._graphs == {4: None, 16: None}
    check_logits(setup, [1, 3, 8, 16])
    setup.decoder.close()


def main() -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    without_multicast()
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
            assert torch.equal(setup.decoder.step.draws.drawn_S[:n], logits.argmax(-1)), f"{n} sequences: draws"
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
    without_memory_on_one(tp)
    exchanges = int(os.environ.get("TPSERVE_SOAK_EXCHANGES", "20000"))
    deep = Setup(
        dataclasses.replace(SHAPES["wide"], n_layers=24), tp, [1, 4, 8, 66, 67, 72]
    )  # graphs of 49 exchanges each
    for bucket in deep.decoder.buckets:
        deep.decoder.capture(bucket)
    soak(deep, tp, exchanges, few(deep))
    soak(deep, tp, exchanges, [deep.batch(n, seed=n) for n in (66, 72, 67)])  # by `row_exchange.py`
    deep.decoder.close()
    real = Setup(dataclasses.replace(SHAPES["7B"], n_layers=4), tp, [16, 32])
    for bucket in real.decoder.buckets:
        real.decoder.capture(bucket)
    soak(real, tp, exchanges, [real.batch(n, seed=n) for n in (13, 32, 9)])  # of parts, by `WordExchange.push_matrix`
    real.decoder.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Kernels of the GPU path in Triton's interpreter, on a CPU: a network made of them beside the plain one, in float32.

What the interpreter does not know is left out: Gluon, assembly (as in random draws), early launches, graphs. Several
ranks are in `ranks.py`. `test_kernels.py` runs this file in a process of its own: the interpreter is chosen when
kernels are imported.

    TRITON_INTERPRET=1 python -m tests.interpreted.checks OUT.json
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import nn

from tpserve.model.args import ModelArgs
from tpserve.model.attention import SequenceSlice
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama
from tpserve.model.network import PlainNetwork, StepInputs
from tpserve.model.parallel import TensorParallel, shard
from tpserve.model.plan import shares
from tpserve.model.rope import rope_table

if TYPE_CHECKING:
    from tpserve.model.chunk_graphs import Room
    from tpserve.model.kernels.row_exchange import RowExchange
    from tpserve.model.share_exchange import ShareExchange

CPU = torch.device("cpu")
ROWS, MAX_LEN, BLOCK, VOCAB = 24, 64, 16, 101
BATCHES = [1, 4, 16]
Part = tuple[int, int, int]  # row, first position, tokens


def llama(heads: int, kv_heads: int) -> Llama:
    args = ModelArgs.from_params(
        {"dim": 64, "n_layers": 2, "n_heads": heads, "n_kv_heads": kv_heads, "vocab_size": VOCAB, "multiple_of": 32,
         "norm_eps": 1e-5}
    )  # fmt: skip
    model = Llama(args, MAX_LEN).requires_grad_(False)
    generator = torch.Generator().manual_seed(heads * kv_heads)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(1 + 0.1 * noise if weight.ndim == 1 else noise * (1 if "tok" in name else weight.shape[1] ** -0.5))
    model.rope_PC2 = rope_table(args, MAX_LEN, CPU)
    return model


def sharded(model: Llama, tp: TensorParallel) -> Llama:
    """What a rank has of it."""
    part, share, whole = copy.deepcopy(model), shares(model.args, tp.size)[tp.rank], dict(model.named_parameters())
    shard(part, tp)
    for name, parameter in list(part.named_parameters()):
        place = share.of(name, model.args.head_dim) if parameter.is_meta else None
        if place is not None:
            owner, _, leaf = name.rpartition(".")
            dim, lo, hi = place
            own = nn.Parameter(whole[name].detach().narrow(dim, lo, hi - lo).contiguous(), requires_grad=False)
            setattr(part.get_submodule(owner), leaf, own)
    return part


class Both:
    """The same steps by the plain network, whole on each rank, and by the kernels.

    Args:
        heads, kv_heads: of the whole network.
        tp: the rank whose share the kernels have.
        exchanges: what `FusedForward` makes sums with, on several ranks.
    """

    def __init__(
        self, heads: int, kv_heads: int, tp: TensorParallel | None = None,
        exchanges: tuple[RowExchange | None, ShareExchange | None] = (None, None),
    ) -> None:  # fmt: skip
        from tpserve.model.chunk_graphs import ChunkGraphs
        from tpserve.model.decode_step import DecodeStep
        from tpserve.model.fused_forward import FusedForward

        tp = tp or TensorParallel()
        model = llama(heads, kv_heads)
        args, blocks = model.args, ROWS * MAX_LEN // BLOCK
        part = sharded(model, tp)
        self.kv_heads = slice(*shares(args, tp.size)[tp.rank].kv_heads)
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(VOCAB, (ROWS, MAX_LEN + 1), generator=generator)
        self.drawn = self.tokens.clone()
        tables = torch.randperm(blocks, generator=generator).view(ROWS, -1)
        self.caches = [
            PagedKVCache(args.n_layers, blocks, BLOCK, n, args.head_dim, dtype=torch.float32, device=CPU)
            for n in (kv_heads, self.kv_heads.stop - self.kv_heads.start)
        ]
        self.plain = PlainNetwork(model, self.caches[0], self.tokens, tables)
        self.decode_step = DecodeStep(part, self.caches[1], tp, self.drawn, tables, BATCHES)
        self.forward = FusedForward(part, self.decode_step.layers, self.caches[1], tp, tables, *exchanges)
        self.graphs = ChunkGraphs(self.forward, self.tokens, VOCAB, tp, ROWS)
        self.tables = tables

    def expected(self, parts: list[Part], asked_N: torch.Tensor | None) -> torch.Tensor:
        rows, positions = flat(parts)
        decodes = [start + 1 for _, start, n in parts if n == 1]
        prompts = [SequenceSlice(start, n) for _, start, n in parts if n > 1]
        return self.plain(StepInputs(rows, positions, decodes, prompts, None, asked_N))

    def mixed(self, parts: list[Part], asked_N: torch.Tensor | None) -> None:
        """Parts of one token come first."""
        from tpserve.model.fused_forward import Chunks

        rows, positions = flat(parts)
        prompts = [part for part in parts if part[2] > 1]
        begins = [len(parts) - len(prompts)]
        for _, _, n in prompts:
            begins.append(begins[-1] + n)
        chunks = Chunks(
            torch.tensor([row for row, _, _ in prompts]), torch.tensor(begins),
            torch.tensor([start for _, start, _ in prompts]),
        )  # fmt: skip
        decodes = positions[: begins[0]] if begins[0] else None
        got = self.forward(self.tokens[rows, positions], rows, positions, decodes, chunks if prompts else None, asked_N)
        self.compare(got, self.expected(parts, asked_N))

    def staged(self, parts: list[Part], asked_N: torch.Tensor) -> Room:
        """As in a graph: padded. Which one it is."""
        rows, positions = flat(parts)
        prompts = [part for part in parts if part[2] > 1]
        decodes = [start + 1 for _, start, n in parts if n == 1]
        begins = [len(decodes)]
        for _, _, n in prompts:
            begins.append(begins[-1] + n)
        chunks_3P = torch.tensor([[*(p[0] for p in prompts), 0], begins, [*(p[1] for p in prompts), 0]])
        room = self.graphs.room(len(rows), decodes, len(prompts), len(asked_N))
        assert room is not None
        got = self.graphs(room, rows, positions, len(decodes), chunks_3P, asked_N)
        self.compare(got, self.expected(parts, asked_N))
        return room

    def decode(self, parts: list[Part], bucket: int) -> None:
        """The most probable tokens, too, which are written where the next step reads them."""
        from tpserve.model.kernels.staging import stage_decodes

        rows, positions = flat(parts)
        step, n = self.decode_step, len(parts)
        self.drawn.copy_(self.tokens)
        stage_decodes(bucket, rows, positions, step.rows_S, step.positions_S)
        step.enqueue(bucket)
        expected = self.expected(parts, None)
        self.compare(step.logits_SV[:n], expected)
        written = self.tokens.clone()
        written[rows, positions + 1] = expected.argmax(-1)
        assert torch.equal(step.draws.drawn_S[:n], expected.argmax(-1))
        assert torch.equal(self.drawn, written)

    def compare(self, got: torch.Tensor, expected: torch.Tensor) -> None:
        """Logits, and what the caches hold."""
        assert got.shape == expected.shape, (got.shape, expected.shape)
        if len(expected):
            assert ((got - expected).norm() / expected.norm()).item() < 3e-6
        plain, fused = self.caches
        for a, b in zip((*plain.k, *plain.v), (*fused.k, *fused.v), strict=True):
            torch.testing.assert_close(a[:, self.kv_heads], b, rtol=1e-4, atol=2e-5)


def flat(parts: list[Part]) -> tuple[torch.Tensor, torch.Tensor]:
    """The row and the position of each token."""
    rows = [row for row, _, n in parts for _ in range(n)]
    return torch.tensor(rows), torch.tensor([p for _, start, n in parts for p in range(start, start + n)])


def last(parts: list[Part]) -> torch.Tensor:
    """Each part's last token."""
    return torch.tensor([n for _, _, n in parts]).cumsum(0) - 1


HEADS = ((4, 4), (4, 2))


def check_mixed_steps() -> None:
    for heads in HEADS:
        both = Both(*heads)
        for parts in (
            [(0, 0, 9), (1, 0, 20), (2, 0, 40)],
            [(0, 9, 1), (1, 20, 5), (3, 0, 3)],
            [(row, 0, 4) for row in range(4, 22)],
            [(0, 10, 1), (1, 25, 1), (2, 40, 1)],
        ):
            both.mixed(parts, last(parts))


def check_steps_that_ask_for_other_rows() -> None:
    both = Both(4, 2)
    nothing = torch.zeros(0, dtype=torch.int64)
    both.mixed([(row, 0, 7) for row in range(18)], nothing)
    both.mixed([(row, 7, 5) for row in range(18)], None)
    both.mixed([(0, 12, 1), (1, 12, 3)], nothing)
    both.mixed([(0, 13, 1), (1, 15, 3)], torch.tensor([3, 0, 3, 3]))


def check_padded_steps() -> None:
    both = Both(4, 2)
    for parts, tokens in (
        ([(0, 0, 9), (1, 0, 20)], 32), ([(0, 9, 1), (2, 0, 11)], 16), ([(0, 10, 1), (1, 20, 1), (2, 11, 40)], 64),
    ):  # fmt: skip
        room = both.staged(parts, last(parts))
        assert (room.tokens, room.decodes, room.parts) == (tokens, 0, 16)


def check_padded_steps_of_many_sequences() -> None:
    """Those that decode are attended to by themselves, and prompts behind them; some of one token read what another
    one's chunk writes in the same step."""
    both = Both(4, 2)
    prompts: list[Part] = [(row, 0, 3 + row) for row in range(22)]
    both.mixed(prompts, last(prompts))
    decodes: list[Part] = [(row, 3 + row, 1) for row in range(20)]
    both.tables[23, :2] = both.tables[22, :2]
    for parts, tokens, chunks in (
        ([*decodes, (20, 23, 9), (21, 24, 2)], 32, 16),
        ([*((row, start + 1, 1) for row, start, _ in decodes[:17]), (23, 32, 1), (22, 0, 33)], 64, 16),
        ([(row, 30, 2) for row in range(19)], 64, 24),
    ):
        room = both.staged(parts, last(parts)[1:])
        assert (room.tokens, room.decodes, room.parts) == (tokens, 24, chunks)


def check_more_logits_than_tokens() -> None:
    """Many answers to one prompt ask for its last row, and log-probabilities of the prompt for the others."""
    both = Both(4, 2)
    for tokens, asked_N in (
        (5, torch.full((20,), 4)),
        (2, torch.tensor([0] * 17)),
        (16, torch.tensor([*range(15), 15, 15])),
    ):
        both.graphs._logits_NV.fill_(7)
        both.staged([(0, 0, tokens)], asked_N)


def check_decode_steps() -> None:
    both = Both(4, 2)
    prompts: list[Part] = [(row, 0, 3 + 3 * row) for row in range(13)]
    both.mixed(prompts, last(prompts))
    for n, bucket in ((1, 1), (3, 4), (13, 16)):
        both.decode([(row, 3 + 3 * row, 1) for row in range(n)], bucket)


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): function for name, function in list(globals().items()) if name.startswith("check_")
}


def like_a_gpu() -> None:
    """A device of which the kernels' tables know something, and whose memory is the host's."""
    import triton.language as tl
    from triton.runtime import interpreter

    from tpserve.model.kernels import norm

    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=4, major=9)
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    # Nothing is copied back, which another rank may have changed by then.
    interpreter.GridExecutor._restore_args_dev = lambda *_: None
    # The language is made the interpreter's once, not at each call: a fifth of the time.
    for function in (norm.store_normed, tl.cumsum):  # of each of the two modules that are the language
        interpreter._patch_lang(function.fn)
    interpreter._patch_lang = lambda _: SimpleNamespace(restore=lambda: None)


def main() -> None:
    like_a_gpu()
    found = {}
    for name, check in CHECKS.items():
        try:
            with torch.no_grad():
                check()
        except Exception:  # noqa: BLE001 - told, and the next one goes on
            found[name] = traceback.format_exc()
        else:
            found[name] = ""
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

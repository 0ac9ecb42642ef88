"""A random model, its decoder, and what decoders must do on one rank and on several."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.gpu.conftest import SEED
from tpserve.model.args import ModelArgs
from tpserve.model.attention import PagedAttention
from tpserve.model.decoder import FusedDecoder
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama
from tpserve.model.parallel import TensorParallel, num_kv_heads, shard
from tpserve.model.quantized import quantize
from tpserve.model.rope import rope_table

ROWS, MAX_LEN, BLOCK = 72, 320, 16
# The second has shapes that no tile divides: feed-forward 344 (176 and 168 on two ranks) and 515 tokens. The third's
# products of tens of rows are `rows_product.py`'s.
SHAPES = {
    "wide": ModelArgs(512, 2, 4, 4, 512, 1024),
    "odd": ModelArgs(256, 3, 8, 2, 515, 344),
    "7B": ModelArgs(4096, 1, 32, 32, 512, 11008),
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
        self.tokens_RL = torch.randint(args.vocab_size, (ROWS, MAX_LEN + 1), generator=seeded).to(device)
        self._given_RL = self.tokens_RL.clone()
        self.tables_RB = torch.randperm(blocks, generator=seeded).view(ROWS, -1).to(device)
        self.model, self.device = model, device
        from tpserve.model.kernels.row_exchange import RowExchange  # these need Triton
        from tpserve.model.share_exchange import ShareExchange

        self.exchanges: tuple[RowExchange | None, ShareExchange | None] = (
            RowExchange.make(tp, 1024, args.dim, torch.bfloat16, device),
            ShareExchange.make(tp, 4096, args.dim, torch.bfloat16, device),
        )
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
        self.tokens_RL.copy_(self._given_RL)  # steps draw


def check_logits(setup: Setup, sizes: Sequence[int]) -> None:
    """The decoder is no further from float32 than the plain network in bfloat16.

    Of some 64 rows a size together: what rounding does to attention that has one key in sight differs from row to row.
    Of one row alone, one in ten would be further off by a tenth (60 seeds of the shape "7B"); the median is 0.79.
    """
    outputs = []
    before = setup.contents()  # a batch's new keys may stand in another batch's past
    for n in sizes:
        setup.decoder.capture(min(bucket for bucket in setup.decoder.buckets if bucket >= n))
        for i in range(-(-64 // n)):
            batch = setup.batch(n, seed=n + 100 * i)
            setup.restore(before)
            outputs.append((n, batch, setup.decoder(*batch).clone(), setup.plain(*batch)))
    setup.to_float32()
    squares = {n: torch.zeros(3, dtype=torch.float64) for n in sizes}
    for n, batch, fused, plain in outputs:
        setup.restore(before)
        reference = setup.plain(*batch)
        squares[n] += torch.stack(
            [x.double().square().sum() for x in (fused - reference, plain - reference, reference)]
        ).cpu()
    for n, sums in squares.items():
        fused_error, plain_error, _ = (sums / sums[2]).sqrt().tolist()
        assert fused_error < 1.1 * plain_error, f"{n} sequences: {fused_error:.4f}, the plain network {plain_error:.4f}"
        assert plain_error < 0.03


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

"""The kernels of one decode step, from the tokens' ids to the logits, on buffers of their own.

Few sequences (up to `linear.MAX_ROWS`) go through kernels that stream the weights; more through what
`tens_of_rows.py` chooses. Over several ranks sums and logits are exchanged through each other's memory
(`all_reduce.py`) while they are small, summed, added and normed a row at a time when they are larger
(`row_exchange.py`), and go through NCCL where there is no such memory.

Shape suffixes: S rows of the step, D residual width, N rows of a joined matrix, H query and K key/value heads of this
rank, E head width, F feed-forward width of this rank, V vocabulary, R, L, B as in `engine/rows.py`.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from tpserve.model.head import head_product
from tpserve.model.kernels import linear, norm, pointwise
from tpserve.model.kernels.all_reduce import WordExchange
from tpserve.model.kernels.decode_plan import choose_cut, deal, decode_scratch
from tpserve.model.kernels.draw import GreedyDraws
from tpserve.model.kernels.paged_attention import paged_decode_attention
from tpserve.model.kernels.row_exchange import RowExchange
from tpserve.model.kernels.tiles import Stream, Tile, choose_tiles
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama, TransformerBlock
from tpserve.model.matrix import Matrix, join
from tpserve.model.parallel import TensorParallel
from tpserve.model.plan import chunk_bounds
from tpserve.model.tens_of_rows import TensOfRows

# Sums go as words (four times their bytes, once to every rank, but no barrier and no pass of their own) up to this.
MAX_WORD_ROWS, MAX_WORD_BYTES = 64, 4 << 20
MAX_SPLIT = 4  # terms that one rank may push of a sum, with up to 8 sequences


@dataclasses.dataclass(frozen=True)
class FusedLayer:
    """A block's weights; matrices that read the same input lie one below the other."""

    attention_norm_D: torch.Tensor
    wqkv_ND: Matrix
    wo_DN: Matrix
    ffn_norm_D: torch.Tensor
    w13_ND: Matrix
    w2_DF: Matrix


def fuse(block: TransformerBlock) -> FusedLayer:
    """Joins a block's matrices; its modules keep views, so the pieces need no memory any more."""
    attention, ffn = block.attention, block.feed_forward
    layer = FusedLayer(
        attention_norm_D=block.attention_norm.weight.detach(),
        wqkv_ND=join(attention.wq, attention.wk, attention.wv),
        wo_DN=join(attention.wo),
        ffn_norm_D=block.ffn_norm.weight.detach(),
        w13_ND=join(ffn.w1, ffn.w3),
        w2_DF=join(ffn.w2),
    )
    # torch would keep the pieces' memory in sizes that the next joined matrix does not fit.
    if layer.wo_DN.q.is_cuda:
        torch.cuda.empty_cache()
    return layer


class DecodeStep:
    """Enqueues steps on the current stream.

    Args:
        model: its weights are joined (`fuse`).
        cache, tp, tokens_RL, tables_RB: as for `FusedDecoder`.
        batch_sizes: S of the steps to come, ascending.

    Attributes:
        rows_S, positions_S: int64 input; position -1 is padding.
        layers: the joined weights.
        logits_SV: float32 output.
        draws: of the most probable tokens, each written behind its row's position.
        tiles: of their products by S; tuning may put others here.
    """

    def __init__(
        self,
        model: Llama,
        cache: PagedKVCache,
        tp: TensorParallel,
        tokens_RL: torch.Tensor,
        tables_RB: torch.Tensor,
        batch_sizes: list[int],
    ) -> None:
        args, device, dtype = model.args, model.output.weight.device, model.output.weight.dtype
        self._cache, self._tp, self._tokens_RL, self._tables_RB = cache, tp, tokens_RL, tables_RB
        self.layers = [fuse(block) for block in model.layers]  # type: ignore[arg-type]
        self._embeddings_VD, self._norm_D = model.tok_embeddings.weight.detach(), model.norm.weight.detach()
        self._head_VD, self._rope_PC2 = Matrix(model.output.weight.detach()), model.rope_PC2
        first, e = self.layers[0], args.head_dim
        h, f = first.wo_DN.shape[1] // e, first.w2_DF.shape[1]
        largest = batch_sizes[-1]
        rows = max(largest, linear.MAX_ROWS)

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.rows_S = zeros(rows, dtype=torch.int64)
        self.positions_S = zeros(rows, dtype=torch.int64).fill_(-1)
        self._slots_S = zeros(rows, dtype=torch.int64)
        self._count = zeros(1, dtype=torch.int32)  # of steps, for the exchange's epochs
        sums = zeros(rows * (args.dim // 4), dtype=torch.float32)
        residual_SD = zeros(rows, args.dim, dtype=torch.float32)
        self._q_SHE, self._attended_SHE, self._act_SF = zeros(rows, h, e), zeros(rows, h, e), zeros(rows, f)
        words = 8 * args.dim * max(1, tp.size - 1)
        self._max_word_rows = min(MAX_WORD_ROWS, max(linear.MAX_ROWS, MAX_WORD_BYTES // words))
        self._rows = RowExchange.make(tp, rows, args.dim, dtype, device) if largest > self._max_word_rows else None
        x_SD, self._partial_SD = (zeros(rows, args.dim), zeros(rows, args.dim)) if self._rows is None else (
            self._rows.x_SD, self._rows.partial_SD
        )  # fmt: skip
        self._normed = norm.Normed(residual_SD, x_SD, sums, args.norm_eps)
        self._share = chunk_bounds(args.vocab_size, tp.size)[0][1]
        self.logits_SV = zeros(rows, args.vocab_size, dtype=torch.float32)
        self.draws = GreedyDraws(rows, tokens_RL)
        if tp.size > 1:
            self._own_logits_SV = zeros(rows, self._head_VD.shape[0], dtype=torch.float32)
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self._products = TensOfRows(device, dtype)
        size, longest = cache.block_size, tokens_RL.shape[1]
        self._cuts = {s: choose_cut(s, h, cache.k[0], dtype, size, longest, processors) for s in batch_sizes}
        self._scratch = decode_scratch(largest, h, e, max(cut.items for cut in self._cuts.values()), device)
        weights = (first.wqkv_ND, first.wo_DN, first.w13_ND, first.w2_DF)
        layer_bytes = sum(weight.nbytes for weight in weights)
        self.tiles = {
            s: choose_tiles(s, args.dim, e, layer_bytes, weights) for s in batch_sizes if s <= linear.MAX_ROWS
        }
        self._per_step = 2 * len(self.layers) + 1
        self._exchange = self._make_exchange() if tp.size > 1 else None
        self._pdl = device.type == "cuda"

    @property
    def exchanges_words(self) -> bool:
        """Whether small sums go through the ranks' memory."""
        return self._exchange is not None

    @property
    def exchanges_rows(self) -> bool:
        """Whether larger sums do."""
        return self._rows is not None

    @property
    def normed(self) -> torch.Tensor:
        """[S, D]: the last step's activations before the head, all ranks' alike; for tests."""
        return self._normed.x_SD

    def _make_exchange(self) -> WordExchange | None:
        """None, on all ranks alike, where a rank cannot reach another's memory."""
        d, v = self._embeddings_VD.shape[1], self.logits_SV.shape[1]
        rows = len(self.rows_S)
        return self._tp.made_by_all(
            lambda: WordExchange(
                self._tp,
                self._count.device,
                terms=max(8 * MAX_SPLIT, min(rows, self._max_word_rows)),
                dim=d,
                gathered=min(rows, linear.MAX_ROWS) * v,
                per_step=self._per_step,
                step=self._count,
            ),
            self._count.device,
        )

    def enqueue(self, s: int, num_layers: int | None = None) -> None:
        """One step of the first `s` input rows; leaves logits for as many, and their greedy tokens.

        Args:
            num_layers: of which the step is made, at most; None: all.
        """
        few = s <= linear.MAX_ROWS
        layers, gains = self.layers[:num_layers], [layer.attention_norm_D for layer in self.layers] + [self._norm_D]
        deal(self._cuts[s], self._scratch, self.rows_S[:s], self.positions_S[:s])
        parts = norm.embed(
            self._tokens_RL, self._tables_RB, self.rows_S[:s], self.positions_S[:s], self._embeddings_VD, gains[0],
            self._normed, self._slots_S, self._count, self._cache.block_size, pdl=self._pdl,
        )  # fmt: skip
        for i, layer in enumerate(layers):
            self._qkv(i, parts, s)
            # Early launching asks for items that are older than the kernel in front, and for keys, but the newest, that
            # nothing here writes: no row of a step reads a block that another one writes.
            paged_decode_attention(
                self._q_SHE[:s], self._cache.k[i], self._cache.v[i], self._tables_RB, self._attended_SHE[:s],
                self._cuts[s], self._scratch, block_size=self._cache.block_size, pdl=self._pdl,
            )  # fmt: skip
            tile = self.tiles[s].wo if few else None
            parts = self._add(self._attended_SHE.flatten(1), layer.wo_DN, layer.ffn_norm_D, s, 2 * i, tile)
            if few:
                linear.gate_up(self._normed, parts, layer.w13_ND, self._act_SF, s, self.tiles[s].gate_up, pdl=self._pdl)
            else:
                self._products.gate_up(
                    self._normed.x_SD[:s], layer.w13_ND, self._act_SF[:s], self._normed, parts
                )  # fmt: skip
            tile = self.tiles[s].down if few else None
            parts = self._add(self._act_SF, layer.w2_DF, gains[i + 1], s, 2 * i + 1, tile)
        self._logits(parts, s)
        # Who draws otherwise writes over it.
        self.draws(self.logits_SV[:s], self.rows_S[:s], self.positions_S[:s], 1, pdl=self._pdl)

    def _qkv(self, i: int, parts: int, s: int) -> None:
        layer, k, v = self.layers[i], self._cache.k[i], self._cache.v[i]
        where = (self._rope_PC2, self.positions_S, self._slots_S)
        if s <= linear.MAX_ROWS:
            tile = self.tiles[s].qkv
            linear.qkv(self._normed, parts, layer.wqkv_ND, self._q_SHE, k, v, *where, s, tile, pdl=self._pdl)
            return
        self._products.qkv(self._normed.x_SD[:s], layer.wqkv_ND, self._q_SHE[:s], k, v, *where, self._normed, parts)

    def _add(
        self, x: torch.Tensor, w: Matrix, gain_D: torch.Tensor, s: int, index: int, tile: Tile | Stream | None
    ) -> int:
        """residual += x @ wᵀ summed over the ranks; returns the parts of the new sums of squares (0: not needed)."""
        if self._tp.size == 1 and tile is not None:
            return linear.add_product(x, w, self._normed, gain_D, s, tile, pdl=self._pdl)
        words = self._exchange if s <= self._max_word_rows else None
        if words is not None and tile is not None:
            linear.push_product(x, w, words, s, index, tile, pdl=self._pdl)
            return words.add(self._normed, gain_D, s, index, tile.split, pdl=self._pdl)
        in_parts = self._tp.size == 1 or words is not None  # other sums are of one part a rank
        partial = self._products.product(x[:s], w, self._partial_SD[:s], in_parts=in_parts)
        if words is not None:
            words.push_matrix(partial, index, pdl=self._pdl)
            return words.add(self._normed, gain_D, s, index, 1, pdl=self._pdl)
        if self._rows is not None and tile is None:
            self._rows.add_norm(self._normed.residual_SD, gain_D, self._normed.eps, s)
            return 0  # these rows are divided by their norm already
        if self._tp.size > 1:
            dist.all_reduce(partial, group=self._tp.group)
        return norm.add(partial, self._normed, gain_D, pdl=self._pdl)

    def _logits(self, parts: int, s: int) -> None:
        few, index = s <= linear.MAX_ROWS, self._per_step - 1
        words = self._exchange if few else None
        out = self.logits_SV if self._tp.size == 1 or words is not None else self._own_logits_SV
        if few:
            first = 0 if words is None else self._tp.rank * self._share
            linear.logits(
                self._normed, parts, self._head_VD, out, s, self.tiles[s].head, words, first, index, pdl=self._pdl
            )
        else:
            head_product(self._normed.x_SD[:s], self._head_VD.q, out[:s])
            if parts:  # else these rows are divided by their norm already
                pointwise.scale(out[:s], self._normed, parts, out[:s], pdl=self._pdl)
        if words is not None:
            words.gather(self.logits_SV[:s], index, pdl=self._pdl)
            return
        if self._tp.size > 1:
            self.logits_SV[:s] = self._tp.gather_vocabulary(out[:s], self.logits_SV.shape[1])

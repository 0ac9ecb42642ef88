"""A step of any mix of prefill and decode tokens on CUDA, launched kernel by kernel: nine a layer.

The same network as `Llama.forward`, on the joined weights of `decode_step.fuse`: cuBLAS's products, and between them
one kernel each for residual add and norm, rotation and cache write, SiLU · up; of few tokens, products that end with
what follows (`tens_of_rows.py`). The residual stream is float32.

Shape suffixes: T tokens, S sequences that decode (their tokens come first), P chunks of prompts, D residual width,
H query and K key/value heads of this rank, E head width, N rows whose logits are asked for, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

from tpserve.model.decode_step import FusedLayer
from tpserve.model.kernels import pointwise, rows
from tpserve.model.kernels.decode_plan import Cut, DecodeScratch, choose_cut, deal, decode_scratch, decode_variants
from tpserve.model.kernels.mixed import MAX_MIXED_ROWS
from tpserve.model.kernels.paged_attention import paged_decode_attention
from tpserve.model.kernels.prefill_attention import compile_for_many, paged_prefill_attention, prefill_tiles
from tpserve.model.kernels.rope import rope_and_write
from tpserve.model.kernels.row_exchange import RowExchange
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama
from tpserve.model.parallel import TensorParallel
from tpserve.model.residual import MIN_DEALT_ROWS, OverlappedResidual, residual_stream
from tpserve.model.share_exchange import ShareExchange
from tpserve.model.tens_of_rows import TensOfRows


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The chunks of prompts in a step; tensors on the device.

    Attributes:
        rows_P: their table rows.
        starts_P1: where each one's tokens begin in T, and where the last one's end.
        contexts_P: tokens of each sequence before its chunk.
    """

    rows_P: torch.Tensor
    starts_P1: torch.Tensor
    contexts_P: torch.Tensor


class FusedForward:
    """Runs mixed steps.

    Args:
        model: its weights have been joined into `layers`.
        layers: see above.
        cache: where keys and values live.
        tp: this rank's place.
        tables_RB: int64 block tables.
        row_exchange, share_exchange: make the sums of the steps that fit them; None: NCCL does.
    """

    def __init__(
        self,
        model: Llama,
        layers: list[FusedLayer],
        cache: PagedKVCache,
        tp: TensorParallel,
        tables_RB: torch.Tensor,
        row_exchange: RowExchange | None = None,
        share_exchange: ShareExchange | None = None,
    ) -> None:
        self._model, self._layers, self._cache, self._tp = model, layers, cache, tp
        self._row_exchange, self._share_exchange = row_exchange, share_exchange
        self._tables_RB = tables_RB
        self._head_dim = model.args.head_dim
        self._heads = layers[0].wo_DN.shape[1] // self._head_dim
        self._max_len = tables_RB.shape[1] * cache.block_size
        self._products = TensOfRows(tables_RB.device, model.output.weight.dtype)
        self._processors = torch.cuda.get_device_properties(tables_RB.device).multi_processor_count

    def __call__(
        self,
        tokens_T: torch.Tensor,
        rows_T: torch.Tensor,
        positions_T: torch.Tensor,
        decodes_S: torch.Tensor | None,
        chunks: Chunks | None,
        rows_N: torch.Tensor | None,
        num_layers: int | None = None,
    ) -> torch.Tensor:
        """One step.

        Args:
            tokens_T: token ids.
            rows_T, positions_T: int64, each token's table row and position.
            decodes_S: the positions of the first S tokens, each of a sequence that decodes; -1: padding, or of a
                chunk. None: there are none.
            chunks: the others.
            rows_N: tokens whose logits to return; None: all.
            num_layers: of which the step is made, at most; None: all.

        Returns:
            float32 logits [N, V], the same on every rank.
        """
        model, size = self._model, self._cache.block_size
        decodes = slice(0, 0 if decodes_S is None else len(decodes_S))
        slots_T = self._tables_RB[rows_T, positions_T // size] * size + positions_T % size
        slots_T = torch.where(positions_T < 0, -1, slots_T)
        decode = None if decodes_S is None else self._plan(rows_T[decodes], decodes_S)
        # In front of the embedding, which is launched normally: attention reads tiles while kernels in front still run.
        tiles = None if chunks is None else prefill_tiles(
            chunks.rows_P, chunks.starts_P1, chunks.contexts_P, len(tokens_T), self._heads, self._cache.k[0],
            model.output.weight.dtype, block_size=size,
        )  # fmt: skip
        stream = residual_stream(
            model, tokens_T, self._tp, self._layers[0].attention_norm_D, self._products, self._row_exchange,
            self._share_exchange,
        )  # fmt: skip
        gains = [layer.attention_norm_D for layer in self._layers[1:]] + [model.norm.weight]
        every = zip(self._layers, self._cache.k, self._cache.v, strict=True)
        last = min(num_layers or len(self._layers), len(self._layers)) - 1
        for i, (layer, k_cache, v_cache) in enumerate(itertools.islice(every, last + 1)):
            q_THE, out_THE = (
                layer.attention_norm_D.new_empty(len(tokens_T), self._heads, self._head_dim) for _ in range(2)
            )  # fmt: skip
            where = (q_THE, k_cache, v_cache, model.rope_PC2, positions_T, slots_T)
            if isinstance(stream, OverlappedResidual):
                rope_and_write(stream.times(layer.wqkv_ND), *where)
            else:
                self._products.qkv(stream.x_TD, layer.wqkv_ND, *where)
            if i == last and rows_N is not None and not len(rows_N):  # prompts that go on: keys and values were all
                return q_THE.new_empty(0, model.args.vocab_size, dtype=torch.float32)
            if decode is not None:
                # Before the chunks: it writes zeros where nobody decodes. Not launched early: a prompt whose all but
                # last token are another one's reads blocks that this step writes.
                paged_decode_attention(
                    q_THE[decodes], k_cache, v_cache, self._tables_RB, out_THE[decodes], *decode, block_size=size
                )
            if tiles is not None:
                paged_prefill_attention(
                    q_THE, k_cache, v_cache, self._tables_RB, tiles, out_THE, block_size=size, pdl=self._products.pdl
                )  # fmt: skip
            if rows_N is None and i == last and isinstance(stream, OverlappedResidual):
                rows_N = torch.arange(len(tokens_T), device=tokens_T.device)  # which come in parts, of 16 bits
            if rows_N is not None and i == last:  # of the others, only keys and values were wanted
                out_THE, stream = out_THE[rows_N], stream.only(rows_N)
            stream.add(out_THE.flatten(1), layer.wo_DN, layer.ffn_norm_D)
            act_TF = out_THE.new_empty(len(out_THE), layer.w2_DF.shape[1])
            if isinstance(stream, OverlappedResidual):
                pointwise.silu_mul(stream.times(layer.w13_ND), act_TF)
            else:
                self._products.gate_up(stream.x_TD, layer.w13_ND, act_TF)
            stream.add(act_TF, layer.w2_DF, gains[i])
        return model.gather(stream.logits(model.output.weight))

    @torch.no_grad()
    def compile(self) -> None:
        """Compiles every variant of the kernels, lest somebody wait for it: by steps that write and read no keys, of as
        many layers as there are kinds of: those before the last, and the last."""
        variants = decode_variants(
            len(self._tables_RB), self._heads, self._cache.k[0], self._model.output.weight.dtype, self._cache.block_size
        )
        many = MAX_MIXED_ROWS + 1  # from here on matrices of fewer bits are widened in memory
        # Products of some tens of rows have a variant for each power of two that they are computed for.
        steps = [*((0, 1 << i) for i in range(4, 8)), (0, many), *((n, n) for n in variants)]
        if self._tp.size > 1:
            steps.append((0, MIN_DEALT_ROWS + 1))  # each rank keeps a share, until few rows are asked for
        for num_decodes, tokens in steps:
            none = torch.zeros(tokens, dtype=torch.int64, device=self._tables_RB.device)
            chunks = Chunks(none[:1], none.new_full((2,), num_decodes), none[:1])
            asked_N = none[:1] if tokens > MIN_DEALT_ROWS else None
            positions = torch.full_like(none, -1)
            decodes_S = positions[:num_decodes] if num_decodes else None
            self(none, none, positions, decodes_S, chunks, asked_N, num_layers=2)
        if self._share_exchange is not None:  # in steps that are too large for it, NCCL makes the sums
            gain_D, eps = self._layers[0].ffn_norm_D, self._model.args.norm_eps
            row_SD = gain_D.new_zeros(1, len(gain_D))
            rows.add_norm(row_SD, row_SD.float(), gain_D, eps)
        compile_for_many(
            self._heads, self._cache.k[0], self._tables_RB, self._model.output.weight.dtype, self._cache.block_size,
            pdl=self._products.pdl,
        )  # fmt: skip

    def _plan(self, rows_S: torch.Tensor, positions_S: torch.Tensor) -> tuple[Cut, DecodeScratch]:
        """What the step's decode attention is told."""
        cut = choose_cut(
            len(rows_S), self._heads, self._cache.k[0], self._model.output.weight.dtype, self._cache.block_size,
            self._max_len, self._processors,
        )  # fmt: skip
        scratch = decode_scratch(len(rows_S), self._heads, self._head_dim, cut.items, rows_S.device)
        deal(cut, scratch, rows_S, positions_S)
        return cut, scratch

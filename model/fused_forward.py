"""A step of any mix of prefill and decode tokens on CUDA, launched kernel by kernel: nine launches a layer.

The same network as `Llama.forward`, on the joined weights of `decode_step.fuse`: cuBLAS's products, and between them
one kernel each for residual add and norm, rotation and cache write, SiLU · up. The residual stream is float32.

Over several ranks the sums of thousands of tokens take a sixth of the step. So such a step's tokens are cut into two
halves that take turns: while one's products are added up (`dealt_residual.py`), the device computes the other's. The
second half's attention reads the keys that the first has just written, which the order of the launches sees to.

Shape suffixes: T tokens, S sequences that decode (their tokens come first), P chunks of prompts, D residual width,
H query and K key/value heads of this rank, E head width, N rows whose logits are asked for, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import torch

from tpserve.model.dealt_residual import DealtResidual, residual_of
from tpserve.model.decode_step import FusedLayer
from tpserve.model.kernels import pointwise, rows
from tpserve.model.kernels.mixed import matmul
from tpserve.model.kernels.paged_attention import (
    DecodeScratch,
    choose_splits,
    decode_scratch,
    decode_variants,
    paged_decode_attention,
)
from tpserve.model.kernels.prefill_attention import paged_prefill_attention, prefill_tiles
from tpserve.model.kernels.rope import rope_and_write
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama
from tpserve.model.matrix import Matrix
from tpserve.model.parallel import TensorParallel, background_group
from tpserve.model.symmetric_sum import SymmetricSum

MIN_TOKENS_IN_TURNS = 2048  # of a step whose halves take turns; smaller products are slower than the sums they hide


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

    def cut(self, lo: int, hi: int) -> Chunks:
        """What of them lies in tokens lo … hi - 1, counted from lo; chunks elsewhere are left without tokens."""
        starts = self.starts_P1.clamp(lo, hi)
        before = starts[:-1] - self.starts_P1[:-1]
        return Chunks(self.rows_P, starts - lo, self.contexts_P + before.clamp(min=0))


@dataclasses.dataclass(frozen=True)
class _Part:
    """Tokens that are computed together.

    Attributes:
        rows_T, positions_T, slots_T: int64, as for the step; slot -1: none.
        num_decodes: S.
        tiles: of the chunks' attention; None: there are none.
        out_THE: where attention writes.
    """

    rows_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    num_decodes: int
    tiles: torch.Tensor | None
    out_THE: torch.Tensor


# What a part asks for: x and w, whose product's sum over the ranks goes into the residual stream, and the gain of the
# norm that it goes on with.
_Wish = tuple[torch.Tensor, Matrix, torch.Tensor]
_Layers = Generator[_Wish, torch.Tensor, None]


class FusedForward:
    """Runs mixed steps.

    Args:
        model: its weights have been joined into `layers`.
        layers: see above.
        cache: where keys and values live.
        tp: this rank's place.
        tables_RB: int64 block tables.
        symmetric: adds up the sums that fit it; None: NCCL does all.
    """

    def __init__(
        self,
        model: Llama,
        layers: list[FusedLayer],
        cache: PagedKVCache,
        tp: TensorParallel,
        tables_RB: torch.Tensor,
        symmetric: SymmetricSum | None = None,
    ) -> None:
        self._model, self._layers, self._cache, self._tp, self._symmetric = model, layers, cache, tp, symmetric
        self._tables_RB = tables_RB
        self._head_dim = model.args.head_dim
        self._kv_heads = cache.k[0].shape[1]
        self._heads = layers[0].wo_DN.shape[1] // self._head_dim
        self._max_len = tables_RB.shape[1] * cache.block_size
        self._processors = torch.cuda.get_device_properties(tables_RB.device).multi_processor_count
        if tp.size > 1:
            assert tp.group is not None
            self._background = background_group(tp.group)
            self._stream = torch.cuda.Stream(tables_RB.device)  # type: ignore[no-untyped-call]

    def __call__(
        self,
        tokens_T: torch.Tensor,
        rows_T: torch.Tensor,
        positions_T: torch.Tensor,
        num_decodes: int,
        chunks: Chunks | None,
        rows_N: torch.Tensor | None,
    ) -> torch.Tensor:
        """One step.

        Args:
            tokens_T: token ids.
            rows_T, positions_T: int64, each token's table row and position.
            num_decodes: S.
            chunks: what follows the S tokens.
            rows_N: tokens whose logits to return; None: all.

        Returns:
            float32 logits [N, V], the same on every rank.
        """
        model, size, t = self._model, self._cache.block_size, len(tokens_T)
        slots_T = self._tables_RB[rows_T, positions_T // size] * size + positions_T % size
        slots_T = torch.where(positions_T < 0, -1, slots_T)
        residual_TD, eps = model.tok_embeddings(tokens_T).float(), model.args.norm_eps
        x_TD = rows.add_norm(None, residual_TD, self._layers[0].attention_norm_D, eps)
        out_THE = x_TD.new_empty(t, self._heads, self._head_dim)

        def part(lo: int, hi: int, cut: Chunks | None) -> _Part:
            tiles = None if cut is None else prefill_tiles(
                cut.rows_P, cut.starts_P1, cut.contexts_P, hi - lo, self._heads, self._kv_heads, self._head_dim,
                out_THE.dtype,
            )  # fmt: skip
            return _Part(
                rows_T[lo:hi], positions_T[lo:hi], slots_T[lo:hi], num_decodes if lo == 0 else 0, tiles, out_THE[lo:hi]
            )

        middle, last = t // 256 * 128, self._layers[-1]
        large = self._tp.size > 1 and t >= MIN_TOKENS_IN_TURNS and num_decodes <= middle
        if large and chunks is not None and rows_N is not None:
            halves = [(0, middle), (middle, t)]
            dealt = [
                DealtResidual(residual_TD[lo:hi], self._tp, self._background, self._stream, eps) for lo, hi in halves
            ]
            parts = [self._layers_of(part(lo, hi, chunks.cut(lo, hi)), x_TD[lo:hi]) for lo, hi in halves]
            _take_turns(parts, dealt)
            residual_ND = residual_of(rows_N, residual_TD, [lo for lo, _ in halves], dealt, self._tp)
            out_NHE = out_THE[rows_N]
        else:
            self._run(self._layers_of(part(0, t, chunks), x_TD), residual_TD)
            # Of the other tokens, only keys and values were wanted.
            residual_ND, out_NHE = (x if rows_N is None else x[rows_N] for x in (residual_TD, out_THE))
        x_ND = self._add(out_NHE.flatten(1), last.wo_DN, residual_ND, last.ffn_norm_D)
        x_ND = self._add(_feed_forward(x_ND, last), last.w2_DF, residual_ND, model.norm.weight)
        return model.gather(x_ND @ model.output.weight.t()).float()

    def _layers_of(self, part: _Part, x_TD: torch.Tensor) -> _Layers:
        """All up to the last layer's attention, from the first norm; what is sent is what was wished for."""
        size, decodes = self._cache.block_size, slice(0, part.num_decodes)
        lens_S = part.positions_T[decodes] + 1
        scratch, splits = self._scratch(part.num_decodes)
        for i, (layer, k_cache, v_cache) in enumerate(zip(self._layers, self._cache.k, self._cache.v, strict=True)):
            q_THE = torch.empty_like(part.out_THE)
            rope_and_write(
                matmul(x_TD, layer.wqkv_ND),
                q_THE,
                k_cache,
                v_cache,
                self._model.rope_PC2,
                part.positions_T,
                part.slots_T,
            )
            if scratch is not None:
                paged_decode_attention(
                    q_THE[decodes], k_cache, v_cache, self._tables_RB, part.rows_T[decodes], lens_S,
                    part.out_THE[decodes], scratch, block_size=size, num_splits=splits,
                )  # fmt: skip
            if part.tiles is not None:
                paged_prefill_attention(
                    q_THE, k_cache, v_cache, self._tables_RB, part.tiles, part.out_THE, block_size=size
                )
            if i < len(self._layers) - 1:
                x_TD = yield part.out_THE.flatten(1), layer.wo_DN, layer.ffn_norm_D
                x_TD = yield _feed_forward(x_TD, layer), layer.w2_DF, self._layers[i + 1].attention_norm_D

    def _run(self, layers: _Layers, residual_TD: torch.Tensor) -> None:
        """One part, from end to end."""
        wish = next(layers, None)
        while wish is not None:
            x_TN, w_DN, gain_D = wish
            wish = _send(layers, self._add(x_TN, w_DN, residual_TD, gain_D))

    def _add(self, x_TN: torch.Tensor, w_DN: Matrix, residual_TD: torch.Tensor, gain_D: torch.Tensor) -> torch.Tensor:
        """residual += the sum over ranks of x · wᵀ; returns its norm."""
        if self._symmetric is not None and self._symmetric.fits(len(x_TN)):
            y_TD = matmul(x_TN, w_DN, self._symmetric.buffer(len(x_TN)))
            self._symmetric.sum(y_TD)
        else:
            y_TD = matmul(x_TN, w_DN)
            if self._tp.size > 1:
                self._tp.all_reduce(y_TD)
        return rows.add_norm(y_TD, residual_TD, gain_D, self._model.args.norm_eps)

    @torch.no_grad()
    def compile(self) -> None:
        """Compiles every variant of the kernels, lest somebody wait for it: by steps that write and read no keys."""
        variants = decode_variants(
            len(self._tables_RB), self._cache.k[0], self._model.output.weight.dtype
        )  # fmt: skip
        for num_decodes, num_chunks in [(0, 1), (0, 17), *((n, 1) for n in variants)]:
            none = torch.zeros(num_decodes or 64, dtype=torch.int64, device=self._tables_RB.device)
            empty_P = none.new_zeros(num_chunks)
            chunks = Chunks(empty_P, none.new_full((num_chunks + 1,), num_decodes), empty_P)
            self(none, none, torch.full_like(none, -1), num_decodes, chunks, None)

    def _scratch(self, num_decodes: int) -> tuple[DecodeScratch | None, int]:
        if not num_decodes:
            return None, 0
        splits = choose_splits(num_decodes, self._kv_heads, self._max_len, self._processors)
        device = self._tables_RB.device
        return decode_scratch(num_decodes, self._heads, self._head_dim, splits, device), splits


def _feed_forward(x_TD: torch.Tensor, layer: FusedLayer) -> torch.Tensor:
    """SiLU(gate) · up, [T, F]."""
    wide_TN = matmul(x_TD, layer.w13_ND)
    act_TF = wide_TN.new_empty(len(wide_TN), wide_TN.shape[1] // 2)
    pointwise.silu_mul(wide_TN, act_TF)
    return act_TF


def _take_turns(parts: list[_Layers], residuals: list[DealtResidual]) -> None:
    """Runs parts to their ends: a sum of one is under way while another computes."""
    running = list(zip(parts, residuals, strict=True))
    wishes = (next(part, None) for part in parts)  # each computed when the one before has been started
    while running:
        going_on = []
        for (part, residual), wish in zip(running, wishes, strict=True):
            if wish is not None:
                residual.start_adding(*wish)
                going_on.append((part, residual))
        running = going_on
        wishes = (_send(part, residual.normed()) for part, residual in running)


def _send(part: _Layers, x_TD: torch.Tensor) -> _Wish | None:
    """The next wish; None: there is none."""
    try:
        return part.send(x_TD)
    except StopIteration:
        return None

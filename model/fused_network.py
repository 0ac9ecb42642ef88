"""The step as fused kernels and CUDA graphs on GPUs of compute capability 9 and 10; see `network.py`.

Shape suffixes: T tokens of the step, R rows of the batch state, L positions, B blocks of a table, N rows whose logits
are asked for, V vocabulary, P chunks of prompts.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tpserve.model.decoder import FusedDecoder
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama
from tpserve.model.logits import SamplingBatch
from tpserve.model.parallel import TensorParallel
from tpserve.model.quantized import has_integers
from tpserve.model.sampling import draw

if TYPE_CHECKING:
    from tpserve.model.network import StepInputs

_MAX_SHARED_ROWS = 8192  # of a step whose rows move while products are made

logger = logging.getLogger(__name__)


class _Graphs(Protocol):
    """What `decoder.py` and `chunk_graphs.py` have in common: what kinds of steps are missing and wanted, and how to
    capture one."""

    wanted: Any

    @property
    def missing(self) -> list[Any]: ...

    def capture(self, kind: Any, /) -> None: ...


class FusedNetwork:
    """Graphs and fused kernels over the same weights.

    Args:
        model, cache, tokens_RL, tables_RB: as for `PlainNetwork`.
        tp: this rank's place.
        max_num_seqs: the largest batch that decodes.
        graphs: whether to capture graphs; without, the same kernels are launched one by one.
        max_num_tokens: of a step.
    """

    lone_step_s = None

    def __init__(
        self,
        model: Llama,
        cache: PagedKVCache,
        tokens_RL: torch.Tensor,
        tables_RB: torch.Tensor,
        tp: TensorParallel,
        *,
        max_num_seqs: int,
        graphs: bool,
        max_num_tokens: int = _MAX_SHARED_ROWS,
    ) -> None:
        from tpserve.model.chunk_graphs import BUCKETS, ChunkGraphs  # these need Triton
        from tpserve.model.fused_forward import Chunks, FusedForward
        from tpserve.model.kernels.cut import MAX_TOP_K
        from tpserve.model.kernels.random_draw import RandomDraws
        from tpserve.model.kernels.row_exchange import RowExchange
        from tpserve.model.residual import MIN_DEALT_ROWS
        from tpserve.model.share_exchange import ShareExchange

        self._tokens_RL, self._chunks, self._tp = tokens_RL, Chunks, tp
        self.drawn_N: torch.Tensor | None = None
        weight = model.output.weight
        few = RowExchange.make(tp, BUCKETS[-1], model.args.dim, weight.dtype, weight.device)
        many = None
        # Integers are widened for each product anew, and rows that come part by part take several.
        if max_num_tokens > MIN_DEALT_ROWS and not has_integers(model):
            shared = min(max_num_tokens, _MAX_SHARED_ROWS)
            many = ShareExchange.make(tp, shared, model.args.dim, weight.dtype, weight.device)
        self._decoder = FusedDecoder(model, cache, tp, tokens_RL, tables_RB, max_num_seqs=max_num_seqs)
        self._forward = FusedForward(model, self._decoder.step.layers, cache, tp, tables_RB, few, many)
        self._draws, self._max_top_k = RandomDraws(max_num_seqs, model.args.vocab_size, tokens_RL), MAX_TOP_K
        self._chunk_graphs = ChunkGraphs(self._forward, tokens_RL, model.args.vocab_size, tp, max_num_seqs)
        self._captures: list[_Graphs] = [self._decoder, self._chunk_graphs] if graphs else []

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """See `Network`."""
        rows_T, positions_T, decoder = inputs.rows_T, inputs.positions_T, self._decoder
        self.drawn_N = None
        if inputs.chunks_3P is None and decoder.fits(len(rows_T)):
            logits_TV = decoder(rows_T, positions_T)
            if inputs.logits_rows_N is not None:
                return logits_TV[inputs.logits_rows_N]
            self.drawn_N = decoder.step.draws.drawn_S[: len(rows_T)]
            return logits_TV
        chunks, graphs = None, self._chunk_graphs
        num_decodes, asked_N = len(inputs.decode_lens), inputs.logits_rows_N
        if inputs.chunks_3P is not None:
            num_logits = len(rows_T) if asked_N is None else len(asked_N)
            room = graphs.room(len(rows_T), inputs.decode_lens, len(inputs.prefills), num_logits)
            if room is not None:
                return graphs(room, rows_T, positions_T, num_decodes, inputs.chunks_3P, asked_N)
            rows, starts, contexts = inputs.chunks_3P
            chunks = self._chunks(rows[:-1], starts, contexts[:-1])
        decodes_S = positions_T[:num_decodes] if num_decodes else None
        return self._forward(
            self._tokens_RL[rows_T, positions_T], rows_T, positions_T, decodes_S, chunks, asked_N
        )  # fmt: skip

    def draw_greedy(self, logits_NV: torch.Tensor, rows_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """See `Network`."""
        return self._draws.greedy(logits_NV, rows_N, positions_N)

    def draw(self, logits_NV: torch.Tensor, batch: SamplingBatch, rows_N: torch.Tensor) -> torch.Tensor:
        """See `Network`."""
        if batch.largest_top_k > self._max_top_k:
            return draw(logits_NV, batch, rows_N, self._tokens_RL)
        step = self._decoder.step
        drawn = self.drawn_N is not None and logits_NV.data_ptr() == step.logits_SV.data_ptr()
        return self._draws(logits_NV, batch, rows_N, step.draws if drawn else None)

    def warm_up(self) -> None:
        """Compiles every kernel; graphs are captured between the steps (`improve`)."""
        from tpserve.model.kernels.precompile import compiled_together

        started_s = time.monotonic()
        with compiled_together(self._tokens_RL.device, self._tp):
            self._forward.compile()
            self._decoder.enqueue_all()
            self._draws.enqueue_all(self._decoder.step.logits_SV[:1])
            self._chunk_graphs.enqueue(self._chunk_graphs.missing[0], num_layers=2)
        self._forward.compile()
        logger.info("compiled kernels in %.1f s", time.monotonic() - started_s)

    @property
    def improvable(self) -> bool:
        """See `Network`."""
        return any(graphs.missing for graphs in self._captures)

    def improve(self, idle: bool) -> None:
        """Captures one graph: of the last step that found none, else, when idle, the largest missing one."""
        lacking = [graphs for graphs in self._captures if graphs.missing]
        wanted = [graphs for graphs in lacking if graphs.wanted is not None]
        for graphs in (wanted or lacking if idle else wanted)[:1]:
            graphs.capture(graphs.missing[-1] if graphs.wanted is None else graphs.wanted)

    def close(self) -> None:
        """Drops the graphs: NCCL's end waits for those that hold its kernels."""
        self._captures = []
        self._decoder.close()
        self._chunk_graphs.close()

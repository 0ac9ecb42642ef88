"""A step's network as the engine calls it: from the state of its rows to logits, by the best way this machine has.

- `PlainNetwork`: `Llama.forward` with `PagedAttention`, on any device and in any type.
- `CompiledNetwork`: the same, and a compiled step for a single sequence on a CPU.
- `FusedNetwork`: bfloat16 on Hopper GPUs: CUDA graphs for steps that only decode, fused kernels for the others.

Shape suffixes: T tokens of the step, R rows of the batch state, L positions, B blocks of a table, N rows whose logits
are asked for, V vocabulary, P chunks of prompts.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from tpserve.model.attention import PagedAttention, SequenceSlice
from tpserve.model.compiled import CompiledDecoder
from tpserve.model.decoder import FusedDecoder
from tpserve.model.huge_pages import consolidate
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama
from tpserve.model.parallel import TensorParallel
from tpserve.model.quantized import has_integers, weight_bytes
from tpserve.model.sampling import draw_greedy

if TYPE_CHECKING:
    from tpserve.model.chunk_graphs import ChunkGraphs

# Smaller models stay in the processor's caches, and a step is made of launches.
WORTH_COMPILING_BYTES = 64 << 20
_MAX_SHARED_ROWS = 8192  # of a step whose rows move while products are made

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """Which tokens a step computes; tensors are on the device.

    Attributes:
        rows_T, positions_T: int64, each token's row and position.
        decode_lens: lengths, after the step, of the sequences with one token, which come first.
        prefills: the others, in order.
        chunks_3P: int64, of the others: row, first token in T, tokens before it; one more column: where the last ends.
        logits_rows_N: tokens whose logits are wanted; None: all.
    """

    rows_T: torch.Tensor
    positions_T: torch.Tensor
    decode_lens: Sequence[int]
    prefills: Sequence[SequenceSlice]
    chunks_3P: torch.Tensor | None
    logits_rows_N: torch.Tensor | None


class Network(Protocol):
    """Computes steps."""

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Writes the step's keys and values into the cache; float32 logits [N, V], good until the next call."""
        ...

    def draw_greedy(self, logits_NV: torch.Tensor, rows_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Writes the most probable tokens into the rows, at those positions; int64 [N], of equals the lowest id.

        Args:
            logits_NV: float32.
            rows_N, positions_N: int64.
        """
        ...

    def warm_up(self) -> None:
        """Does what would otherwise delay the first steps."""
        ...

    @property
    def improvable(self) -> bool:
        """Whether `improve` has anything left to do."""
        ...

    def improve(self, idle: bool) -> None:
        """Between steps: a piece, tens of milliseconds, of what makes later ones faster and changes no bit of them.

        Args:
            idle: nobody waits for a step: also what no step has asked for yet. On several ranks alike.
        """
        ...

    def close(self) -> None:
        """Lets go of what holds on to the process group; no further call."""
        ...


class _Finished:
    """A network that has nothing to improve."""

    improvable = False

    def improve(self, idle: bool) -> None:
        """Nothing."""


class PlainNetwork(_Finished):
    """`Llama.forward`, operation by operation.

    Args:
        model: on its device.
        cache: where keys and values live.
        tokens_RL, tables_RB: int64, the rows' tokens and block tables.
    """

    def __init__(self, model: Llama, cache: PagedKVCache, tokens_RL: torch.Tensor, tables_RB: torch.Tensor) -> None:
        self._model, self._cache, self._tokens_RL, self._tables_RB = model, cache, tokens_RL, tables_RB

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """See `Network`."""
        rows_T, positions_T = inputs.rows_T, inputs.positions_T
        attend = PagedAttention(self._cache, self._tables_RB, rows_T, positions_T, inputs.decode_lens, inputs.prefills)
        logits: torch.Tensor = self._model(
            self._tokens_RL[rows_T, positions_T], positions_T, attend, inputs.logits_rows_N
        )
        return logits

    def draw_greedy(self, logits_NV: torch.Tensor, rows_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """See `Network`."""
        return draw_greedy(logits_NV, rows_N, positions_N, self._tokens_RL)

    def warm_up(self) -> None:
        """Nothing: the first step is like the others."""

    def close(self) -> None:
        """Nothing."""


class CompiledNetwork(PlainNetwork):
    """As `PlainNetwork`; a step of one token of one sequence is compiled.

    Attributes:
        num_compiled_steps: that the compiled functions made.
    """

    def __init__(self, model: Llama, cache: PagedKVCache, tokens_RL: torch.Tensor, tables_RB: torch.Tensor) -> None:
        super().__init__(model, cache, tokens_RL, tables_RB)
        self._decoder = CompiledDecoder(model, cache, tokens_RL, tables_RB)
        self.num_compiled_steps = 0

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """See `Network`."""
        if self._decoder.ready and not inputs.prefills and len(inputs.decode_lens) == 1:
            self.num_compiled_steps += 1
            return self._decoder(inputs.rows_T, inputs.positions_T, inputs.decode_lens[0])
        return super().__call__(inputs)

    def draw_greedy(self, logits_NV: torch.Tensor, rows_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """See `Network`."""
        if self._decoder.ready and len(rows_N) == 1:
            return self._decoder.draw_greedy(logits_NV[0], rows_N, positions_N)
        return super().draw_greedy(logits_NV, rows_N, positions_N)

    def warm_up(self) -> None:
        """Compiles; torch keeps the result on disk, and the next start takes a few seconds less."""
        started_s = time.monotonic()
        try:
            self._decoder.compile()
        except RuntimeError as e:  # a compiler without its headers, a full disk: slower, and nothing else
            logger.warning("decode steps are not compiled: %.300s", " ".join(str(e).split()))
        else:
            logger.info("compiled the decode step of one sequence in %.1f s", time.monotonic() - started_s)


class FusedNetwork:
    """Graphs and fused kernels over the same weights.

    Args:
        model, cache, tokens_RL, tables_RB: as for `PlainNetwork`.
        tp: this rank's place.
        max_num_seqs: the largest batch that decodes.
        graphs: whether to capture graphs; without, the same kernels are launched one by one.
        max_num_tokens: of a step.
    """

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
        from tpserve.model.kernels.row_exchange import RowExchange
        from tpserve.model.residual import MIN_DEALT_ROWS
        from tpserve.model.share_exchange import ShareExchange

        self._tokens_RL, self._chunks, self._tp = tokens_RL, Chunks, tp
        weight = model.output.weight
        few = RowExchange.make(tp, BUCKETS[-1], model.args.dim, weight.dtype, weight.device)
        many = None
        # Integers are widened for each product anew, and rows that come part by part take several.
        if max_num_tokens > MIN_DEALT_ROWS and not has_integers(model):
            shared = min(max_num_tokens, _MAX_SHARED_ROWS)
            many = ShareExchange.make(tp, shared, model.args.dim, weight.dtype, weight.device)
        self._decoder = FusedDecoder(model, cache, tp, tokens_RL, tables_RB, max_num_seqs=max_num_seqs)
        self._forward = FusedForward(model, self._decoder.step.layers, cache, tp, tables_RB, few, many)
        self._chunk_graphs = ChunkGraphs(self._forward, tokens_RL, model.args.vocab_size)
        self._to_capture: list[FusedDecoder | ChunkGraphs] = [self._decoder, self._chunk_graphs] if graphs else []

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """See `Network`."""
        rows_T, positions_T, decoder = inputs.rows_T, inputs.positions_T, self._decoder
        if inputs.chunks_3P is None and decoder.fits(len(rows_T)):
            logits_TV = decoder(rows_T, positions_T)
            return logits_TV if inputs.logits_rows_N is None else logits_TV[inputs.logits_rows_N]
        chunks, graphs = None, self._chunk_graphs
        if inputs.chunks_3P is not None:
            parts = len(inputs.decode_lens) + len(inputs.prefills)
            num_logits = len(rows_T) if inputs.logits_rows_N is None else len(inputs.logits_rows_N)
            if graphs.fits(len(rows_T), parts, num_logits):
                return graphs(rows_T, positions_T, len(inputs.decode_lens), inputs.chunks_3P, inputs.logits_rows_N)
            rows, starts, contexts = inputs.chunks_3P
            chunks = self._chunks(rows[:-1], starts, contexts[:-1])
        return self._forward(
            self._tokens_RL[rows_T, positions_T], rows_T, positions_T, len(inputs.decode_lens), chunks,
            inputs.logits_rows_N,
        )  # fmt: skip

    def draw_greedy(self, logits_NV: torch.Tensor, rows_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """See `Network`."""
        return draw_greedy(logits_NV, rows_N, positions_N, self._tokens_RL)

    def warm_up(self) -> None:
        """Compiles every kernel; graphs are captured between the steps (`improve`)."""
        from tpserve.model.kernels.precompile import compiled_together

        started_s = time.monotonic()
        with compiled_together(self._tokens_RL.device, self._tp):
            self._forward.compile()
            self._decoder.enqueue_all()
            self._chunk_graphs.enqueue(self._chunk_graphs.missing[0])
        self._forward.compile()
        logger.info("compiled kernels in %.1f s", time.monotonic() - started_s)

    @property
    def improvable(self) -> bool:
        """See `Network`."""
        return bool(self._to_capture)

    def improve(self, idle: bool) -> None:
        """Captures one graph: of the last step that found none, else, when idle, the largest missing one."""
        wanted = [graphs for graphs in self._to_capture if graphs.wanted is not None]
        for graphs in (wanted or self._to_capture if idle else wanted)[:1]:
            graphs.capture(graphs.missing[-1] if graphs.wanted is None else graphs.wanted)
        self._to_capture = [graphs for graphs in self._to_capture if graphs.missing]

    def close(self) -> None:
        """Drops the graphs: NCCL's end waits for those that hold its kernels."""
        self._to_capture = []
        self._decoder.close()
        self._chunk_graphs.close()


def choose_network(
    model: Llama,
    cache: PagedKVCache,
    tokens_RL: torch.Tensor,
    tables_RB: torch.Tensor,
    tp: TensorParallel,
    *,
    max_num_seqs: int,
    max_num_tokens: int,
    fused: bool,
    graphs: bool,
) -> Network:
    """The fastest network that is wanted and that this machine, type and shape have; arguments: `FusedNetwork`."""
    if fused and importlib.util.find_spec("triton") and FusedDecoder.supports(model, tokens_RL.device):
        return FusedNetwork(
            model, cache, tokens_RL, tables_RB, tp, max_num_seqs=max_num_seqs, max_num_tokens=max_num_tokens,
            graphs=graphs,
        )  # fmt: skip
    large = weight_bytes(model) >= WORTH_COMPILING_BYTES
    if large and tokens_RL.device.type == "cpu":
        consolidate(model)
    if fused and graphs and large and tp.size == 1 and CompiledDecoder.supports(model, tables_RB.shape[1]):
        return CompiledNetwork(model, cache, tokens_RL, tables_RB)
    return PlainNetwork(model, cache, tokens_RL, tables_RB)

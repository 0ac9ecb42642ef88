"""A step's network as the engine calls it: from the state of its rows to logits, by the best way this machine has.

- `PlainNetwork`: `Llama.forward` with `PagedAttention`, on any device and in any type.
- `CompiledNetwork`: the same, and a compiled step for a single sequence on a CPU.
- `FusedNetwork` (`fused_network.py`): compute capability 9 and 10; CUDA graphs for small steps, fused kernels
  for others.

Shape suffixes: T tokens of the step, R rows of the batch state, L positions, B blocks of a table, N rows whose logits
are asked for, V vocabulary, P chunks of prompts.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import time
from collections.abc import Sequence
from typing import Protocol

import torch

from tpserve.model.attention import PagedAttention, SequenceSlice
from tpserve.model.compiled import CompiledDecoder
from tpserve.model.decoder import FusedDecoder
from tpserve.model.fused_network import FusedNetwork
from tpserve.model.huge_pages import consolidate
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama
from tpserve.model.logits import SamplingBatch
from tpserve.model.onednn import use_onednn
from tpserve.model.parallel import TensorParallel
from tpserve.model.quantized import weight_bytes
from tpserve.model.sampling import draw, draw_greedy

# Smaller models stay in the processor's caches, and a step is made of launches.
WORTH_COMPILING_BYTES = 64 << 20

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
    """Computes steps.

    Attributes:
        drawn_N: what `draw_greedy` would draw from all of the last call's logits, if it is drawn and written already,
            one place behind each row's position; good until the next call. None: it is not. A row with NaN may
            get another token.
    """

    drawn_N: torch.Tensor | None

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

    def draw(self, logits_NV: torch.Tensor, batch: SamplingBatch, rows_N: torch.Tensor) -> torch.Tensor:
        """Writes the tokens that `sampling.sample` draws into the rows, at the batch's positions; int64 [N].

        Args:
            logits_NV: float32, from `process_logits`: the last call's own where it had nothing to do.
            batch: the rows' parameters.
            rows_N: int64.
        """
        ...

    def warm_up(self) -> None:
        """Does what would otherwise delay the first steps."""
        ...

    @property
    def lone_step_s(self) -> float | None:
        """Seconds of a step of one sequence, if the host had better not be asked between two of them because it takes
        the cores that compute; None: it does not."""
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
    lone_step_s: float | None = None
    drawn_N: torch.Tensor | None = None

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

    def draw(self, logits_NV: torch.Tensor, batch: SamplingBatch, rows_N: torch.Tensor) -> torch.Tensor:
        """See `Network`."""
        return draw(logits_NV, batch, rows_N, self._tokens_RL)

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
            self.lone_step_s = self._step_s()

    @torch.inference_mode()
    def _step_s(self) -> float:
        """Seconds of a compiled step, the fastest of a few; before serving, for it writes into the cache."""
        row, position = torch.zeros(2, 1, dtype=torch.int64).unbind()
        times = []
        for _ in range(5):
            started_s = time.perf_counter()
            self._decoder(row, position, 1)
            times.append(time.perf_counter() - started_s)
        return min(times)


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
        use_onednn(model)
    if fused and graphs and large and tp.size == 1 and CompiledDecoder.supports(model, tables_RB.shape[1]):
        return CompiledNetwork(model, cache, tokens_RL, tables_RB)
    return PlainNetwork(model, cache, tokens_RL, tables_RB)

"""Decode steps as CUDA graphs: one token of each of N sequences, from the token's id to the logits, in one launch.

The graph reads and writes where the engine's own state is (tokens, block tables, the paged cache), so a step is given
two numbers a sequence: its row and its position. Buckets are the batch sizes that graphs exist for; a smaller batch is
padded with entries of position -1, which read nobody's tokens, write no keys, attend to nothing and draw nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tpserve.model import kernels
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama
from tpserve.model.parallel import TensorParallel
from tpserve.model.quantized import is_quantized

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation

logger = logging.getLogger(__name__)


class FusedDecoder:
    """One decode step for N sequences, one token each, as one CUDA graph a bucket.

    Takes over the model's weights: those of a block that read the same input are joined, one block at a time, and the
    modules' own parameters become views of them, so `Llama.forward` goes on working and no second copy exists.
    On several ranks all must make the same decoders, captures and calls in the same order.

    Args:
        model: on its device; `supports` says yes to it.
        cache: where keys and values live.
        tp: this rank's place.
        tokens_RL: int64, the tokens of each row; the graph reads a sequence's token at its position, and writes
            the most probable next one behind it.
        tables_RB: int64 block tables.
        max_num_seqs: the largest batch.
        buckets: batch sizes; None: `default_buckets`.

    Attributes:
        wanted: the bucket of the last step that found no graph, until it has one.
    """

    def __init__(
        self,
        model: Llama,
        cache: PagedKVCache,
        tp: TensorParallel,
        tokens_RL: torch.Tensor,
        tables_RB: torch.Tensor,
        *,
        max_num_seqs: int,
        buckets: Sequence[int] | None = None,
    ) -> None:
        from tpserve.model.decode_step import DecodeStep  # needs Triton
        from tpserve.model.kernels.staging import stage_decodes

        self.buckets = sorted(set(buckets or default_buckets(max_num_seqs)))
        self.step = DecodeStep(model, cache, tp, tokens_RL, tables_RB, self.buckets)
        self._device, self._stage_decodes, self._tp = tokens_RL.device, stage_decodes, tp
        self.wanted: int | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}  # None: there was no memory for it
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @staticmethod
    def supports(model: Llama, device: torch.device) -> bool:
        """Whether this model decodes so: Triton, and a GPU of compute capability 9 or 10 (early launches, and shared
        memory for the tiles, of which 12 has less); with fewer bits, bfloat16."""
        weight, args = model.output.weight, model.args
        return (
            importlib.util.find_spec("triton") is not None
            and device.type == "cuda"
            and torch.cuda.get_device_capability(device)[0] in (9, 10)
            and (weight.dtype == torch.bfloat16 or not is_quantized(model))
            and args.dim % 64 == 0
            and args.head_dim % 16 == 0
            and kernels.supports(device, weight.dtype, args.n_heads, args.n_kv_heads, args.head_dim)
        )

    @torch.no_grad()
    def capture(self, bucket: int) -> None:
        """Makes one bucket's graph: compiles and warms up its kernels on padding, then records them. Without the memory
        to record them, such steps stay as they are."""
        if bucket in self._graphs:
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        # Its products of few rows are faster (1% of a step of 96 rows on an H200), those of prompts are not.
        with torch.cuda.stream(self._stream), _products_by("cublaslt"):
            self.step.positions_S.fill_(-1)
            self.step.enqueue(bucket)
            self._stream.synchronize()
            graph = record(lambda: self.step.enqueue(bucket), self._pool, self._stream, self._tp)
        current.wait_stream(self._stream)
        self._graphs[bucket] = graph
        self.wanted = None

    def _stage(self, bucket: int, rows_N: torch.Tensor, positions_N: torch.Tensor) -> None:
        self._stage_decodes(bucket, rows_N, positions_N, self.step.rows_S, self.step.positions_S)

    @property
    def missing(self) -> list[int]:
        """Buckets whose graph is still to be captured, ascending."""
        return [bucket for bucket in self.buckets if bucket not in self._graphs]

    def enqueue_all(self) -> None:
        """A step of padding of every bucket, so that `compiled_together` sees all kernels: of two layers, for the first
        one's norm has its sums from the embedding, in other parts than the others' from the products before them."""
        self.step.positions_S.fill_(-1)
        self._stage(1, self.step.rows_S[:1], self.step.positions_S[:1])
        for bucket in self.buckets:
            self.step.enqueue(bucket, num_layers=2)

    def close(self) -> None:
        """Drops the graphs. Before the process group is destroyed: NCCL waits for all graphs that hold its kernels."""
        torch.cuda.synchronize(self._device)
        self._graphs.clear()

    def fits(self, n: int) -> bool:
        """Whether a batch of `n` has a bucket."""
        return n <= self.buckets[-1]

    def __call__(self, rows_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Runs one step: by its bucket's graph; where that is still to be captured, by the same kernels, one by one.

        Args:
            rows_N: int64, the sequences' rows.
            positions_N: int64, the position of the token that each computes.

        Returns:
            float32 logits [N, V], the same bits on every rank; overwritten by the next call. The most probable token
            of each row is in `step.draws`, and in the row behind its position.
        """
        n = len(rows_N)
        bucket = min(bucket for bucket in self.buckets if bucket >= n)
        self._stage(bucket, rows_N, positions_N)
        graph = self._graphs.get(bucket)
        if graph is not None:
            graph.replay()
        else:
            self.wanted = None if bucket in self._graphs else bucket
            with _products_by("cublaslt"):
                self.step.enqueue(bucket)
        return self.step.logits_SV[:n]


def record(
    work: Callable[[], None], pool: Any, stream: torch.cuda.Stream, tp: TensorParallel
) -> torch.cuda.CUDAGraph | None:
    """A graph of what `work` launches on the current stream; None, on all ranks alike, if one has no memory for it:
    NCCL wants a collective in everybody's graph or in nobody's.
    """
    graph, ok = torch.cuda.CUDAGraph(), torch.ones(1, device=stream.device)
    try:
        # Other threads of the process may use the device meanwhile.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            work()
    except (torch.cuda.OutOfMemoryError, torch.AcceleratorError) as e:  # of the allocator, of the driver
        if not isinstance(e, torch.cuda.OutOfMemoryError) and getattr(e, "error_code", None) != _OUT_OF_MEMORY:
            raise
        logger.warning("no memory for a CUDA graph: its kernels go on being launched one by one (%s)", e)
        ok.zero_()
    return graph if tp.all_agree(ok) else None


@contextlib.contextmanager
def _products_by(library: str) -> Iterator[None]:
    """torch's products by this library, inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the choice is experimental
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library(library)
        try:
            yield
        finally:
            torch.backends.cuda.preferred_blas_library(before)


def default_buckets(max_num_seqs: int) -> list[int]:
    """1, 2, 4 … 32, then every 32 sequences, up to the first that holds `max_num_seqs`."""
    sizes = [1, 2, 4, 8, 16, *range(32, max_num_seqs + 32, 32)]
    return [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < max_num_seqs]

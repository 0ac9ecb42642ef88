"""Small mixed steps as CUDA graphs: a prompt of a few hundred tokens takes the device less time than launching its
kernels one by one takes the host.

A graph has room for a bucket of tokens in up to `MAX_PARTS` sequences; a decoding sequence is a chunk of one token.
What is not used is padding: tokens at position -1, which write nothing, and sequences without queries.

Shape suffixes: T tokens, P parts, N rows whose logits are asked for, R, L, B as in `network.py`.
"""

from __future__ import annotations

import torch

from tpserve.model.decoder import record
from tpserve.model.fused_forward import Chunks, FusedForward
from tpserve.model.kernels.staging import Staged
from tpserve.model.parallel import TensorParallel

BUCKETS = (16, 32, 64, 128, 256, 512, 1024)
MAX_PARTS = 16


class ChunkGraphs:
    """Captures and replays.

    Args:
        forward: what is captured.
        tokens_RL: int64, the rows' tokens.
        vocab_size: of the logits.
        tp: this rank's place.

    Attributes:
        wanted: the bucket of the last step that found no graph, until it has one.
    """

    def __init__(self, forward: FusedForward, tokens_RL: torch.Tensor, vocab_size: int, tp: TensorParallel) -> None:
        device = tokens_RL.device
        self._forward, self._tokens_RL, self._tp = forward, tokens_RL, tp
        self._staged = Staged.empty(BUCKETS[-1], MAX_PARTS, device)
        self._logits_NV = torch.zeros(MAX_PARTS, vocab_size, dtype=torch.float32, device=device)
        self.wanted: int | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}  # None: there was no memory for it
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def fits(self, num_tokens: int, num_parts: int, num_logits: int) -> bool:
        """Whether a step is of this kind."""
        return num_parts <= MAX_PARTS and num_logits <= MAX_PARTS and num_tokens <= BUCKETS[-1]

    @property
    def missing(self) -> list[int]:
        """Buckets whose graph is still to be captured, ascending."""
        return [bucket for bucket in BUCKETS if bucket not in self._graphs]

    def _compute(self, bucket: int, num_layers: int | None = None) -> None:
        staged = self._staged
        rows_T, positions_T = staged.rows_T[:bucket], staged.positions_T[:bucket]
        tokens_T = self._tokens_RL[rows_T, positions_T.clamp(min=0)]
        chunks = Chunks(staged.rows_P, staged.starts_P1, staged.contexts_P)
        logits_NV = self._forward(tokens_T, rows_T, positions_T, 0, chunks, staged.logits_rows_N, num_layers)
        self._logits_NV.copy_(logits_NV)

    @torch.no_grad()
    def enqueue(self, bucket: int, num_layers: int | None = None) -> None:
        """A step of padding, of so many layers at most (None: all)."""
        none = torch.zeros(3, 1, dtype=torch.int64, device=self._tokens_RL.device)
        self._staged.stage(bucket, none[0], none[0] - 1, 0, none, none[0])
        self._compute(bucket, num_layers)

    @torch.no_grad()
    def capture(self, bucket: int) -> None:
        """Makes one bucket's graph, on padding; see `FusedDecoder.capture`."""
        current = torch.cuda.current_stream(self._tokens_RL.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self.enqueue(bucket)
            self._stream.synchronize()
            graph = record(lambda: self._compute(bucket), self._pool, self._stream, self._tp)
        current.wait_stream(self._stream)
        self._graphs[bucket] = graph
        self.wanted = None

    def close(self) -> None:
        """Drops the graphs; see `FusedDecoder.close`."""
        self._graphs.clear()

    def __call__(
        self,
        rows_T: torch.Tensor,
        positions_T: torch.Tensor,
        num_decodes: int,
        chunks_3P: torch.Tensor,
        logits_rows_N: torch.Tensor | None,
    ) -> torch.Tensor:
        """Runs a step that `fits`: by its bucket's graph; where that is still to be captured, by the same kernels, one
        by one, on the same padding. Arguments as `StepInputs` has them.

        Returns:
            float32 logits [N, V], overwritten by the next call.
        """
        bucket = min(bucket for bucket in BUCKETS if bucket >= len(rows_T))
        self._staged.stage(bucket, rows_T, positions_T, num_decodes, chunks_3P, logits_rows_N)
        graph = self._graphs.get(bucket)
        if graph is not None:
            graph.replay()
        else:
            self.wanted = None if bucket in self._graphs else bucket
            self._compute(bucket)
        return self._logits_NV[: len(rows_T) if logits_rows_N is None else len(logits_rows_N)]

"""Small mixed steps as CUDA graphs: a prompt of a few hundred tokens takes the device less time than launching its
kernels one by one takes the host.

A graph has room for a bucket of tokens in up to `MAX_PARTS` sequences; a decoding sequence is a chunk of one token.
What is not used is padding: tokens at position -1, which write nothing, and sequences without queries.

Shape suffixes: T tokens, P parts, N rows whose logits are asked for, R, L, B as in `network.py`.
"""

from __future__ import annotations

import torch

from tpserve.model.fused_forward import Chunks, FusedForward

BUCKETS = (16, 32, 64, 128, 256, 512, 1024)
MAX_PARTS = 16


class ChunkGraphs:
    """Captures and replays.

    Args:
        forward: what is captured.
        tokens_RL: int64, the rows' tokens.
        vocab_size: of the logits.
    """

    def __init__(self, forward: FusedForward, tokens_RL: torch.Tensor, vocab_size: int) -> None:
        device, largest = tokens_RL.device, BUCKETS[-1]
        self._forward, self._tokens_RL = forward, tokens_RL

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self._rows_T, self._positions_T = zeros(largest), zeros(largest).fill_(-1)
        self._rows_P, self._starts_P1, self._contexts_P = zeros(MAX_PARTS), zeros(MAX_PARTS + 1), zeros(MAX_PARTS)
        self._logits_rows_N = zeros(MAX_PARTS)
        self._counting = torch.arange(MAX_PARTS, device=device)
        self._logits_NV = torch.zeros(MAX_PARTS, vocab_size, dtype=torch.float32, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def fits(self, num_tokens: int, num_parts: int, num_logits: int) -> bool:
        """Whether there is a graph for such a step."""
        return num_parts <= MAX_PARTS and num_logits <= MAX_PARTS and self._bucket(num_tokens) is not None

    def _bucket(self, num_tokens: int) -> int | None:
        return next((bucket for bucket in BUCKETS if bucket >= num_tokens and bucket in self._graphs), None)

    def _compute(self, bucket: int) -> None:
        rows_T, positions_T = self._rows_T[:bucket], self._positions_T[:bucket]
        tokens_T = self._tokens_RL[rows_T, positions_T.clamp(min=0)]
        chunks = Chunks(self._rows_P, self._starts_P1, self._contexts_P, bucket)
        self._logits_NV.copy_(self._forward(tokens_T, rows_T, positions_T, 0, chunks, self._logits_rows_N))

    @torch.no_grad()
    def capture(self, bucket: int) -> None:
        """Makes one bucket's graph, on padding."""
        current = torch.cuda.current_stream(self._rows_T.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._positions_T.fill_(-1)
            self._starts_P1.zero_()
            self._compute(bucket)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                self._compute(bucket)
        current.wait_stream(self._stream)
        self._graphs[bucket] = graph

    def __call__(
        self,
        rows_T: torch.Tensor,
        positions_T: torch.Tensor,
        num_decodes: int,
        chunks_3P: torch.Tensor,
        logits_rows_N: torch.Tensor | None,
    ) -> torch.Tensor:
        """Replays a step that `fits`; arguments as `StepInputs` has them.

        Returns:
            float32 logits [N, V], overwritten by the next call.
        """
        t, s, p = len(rows_T), num_decodes, chunks_3P.shape[1] - 1
        bucket = self._bucket(t)
        assert bucket is not None
        self._rows_T[:t].copy_(rows_T)
        self._positions_T[:t].copy_(positions_T)
        self._positions_T[t:bucket].fill_(-1)
        self._rows_P[:s].copy_(rows_T[:s])
        self._contexts_P[:s].copy_(positions_T[:s])
        self._starts_P1[:s].copy_(self._counting[:s])
        self._rows_P[s : s + p].copy_(chunks_3P[0, :p])
        self._starts_P1[s : s + p + 1].copy_(chunks_3P[1])
        self._contexts_P[s : s + p].copy_(chunks_3P[2, :p])
        self._starts_P1[s + p + 1 :].fill_(t)
        n = t if logits_rows_N is None else len(logits_rows_N)
        self._logits_rows_N[:n].copy_(self._counting[:n] if logits_rows_N is None else logits_rows_N)
        self._logits_rows_N[n:].zero_()
        self._graphs[bucket].replay()
        return self._logits_NV[:n]

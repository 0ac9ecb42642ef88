"""Mixed steps of up to 1,024 tokens as CUDA graphs: they take the device less time than launching their kernels one by
one takes the host.

A graph has *room* for a number of tokens, of sequences that decode, of chunks and of rows of logits. What is not used
is padding: tokens at position -1, which write nothing, and sequences without queries. Where there are few sequences,
one that decodes is a chunk of one token; otherwise those that decode come first, and their attention splits their keys.

Shape suffixes: T tokens, P parts, S sequences that decode, N rows whose logits are asked for, R, L, B as in
`network.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from tpserve.model.decoder import record
from tpserve.model.fused_forward import Chunks, FusedForward
from tpserve.model.kernels.staging import Staged
from tpserve.model.parallel import TensorParallel

# A product takes what reading its weight takes up to some 200 rows, and from there on what its rows take.
BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024)
FEW_PARTS = 16
# Keys of a sequence that decodes: as a chunk of one token one program a key/value head reads them all, while attention
# that splits keys is a kernel more. ms a step of 7B on an H200, as chunks and split: 1 x 640 keys and 16 tokens 4.13,
# 4.10; 1 x 2,048 4.94, 4.25; 8 x 640 4.45, 4.69; 8 x 2,048 5.71, 6.02; 8 x 640 and 200 tokens 7.55, 7.78.
_LONG_DECODE = 2048


@dataclasses.dataclass(frozen=True)
class Room:
    """What a graph has room for.

    Attributes:
        tokens: of the step.
        decodes: of these, the first, may be of sequences that decode; 0: those are parts, too.
        parts: chunks of prompts.
        logits: rows that are asked for.
    """

    tokens: int
    decodes: int
    parts: int
    logits: int


class ChunkGraphs:
    """Captures and replays.

    Args:
        forward: what is captured.
        tokens_RL: int64, the rows' tokens.
        vocab_size: of the logits.
        tp: this rank's place.
        max_num_seqs: in a step.

    Attributes:
        wanted: the room that the last step found no graph of, until there is one.
    """

    def __init__(
        self, forward: FusedForward, tokens_RL: torch.Tensor, vocab_size: int, tp: TensorParallel, max_num_seqs: int
    ) -> None:
        device, self._max_seqs, rows = tokens_RL.device, max_num_seqs, max(FEW_PARTS, max_num_seqs)
        self._forward, self._tokens_RL, self._tp = forward, tokens_RL, tp
        self._staged = Staged.empty(BUCKETS[-1], rows, rows, device)
        self._logits_NV = torch.zeros(rows, vocab_size, dtype=torch.float32, device=device)
        # What is captured before a step has it.
        self._usual = [self._few(n) for n in BUCKETS]
        if max_num_seqs > FEW_PARTS:
            self._usual = [self._many(n, FEW_PARTS) for n in BUCKETS] + self._usual
        self.wanted: Room | None = None
        self._graphs: dict[Room, torch.cuda.CUDAGraph | None] = {}  # None: there was no memory for it
        self._stream: torch.cuda.Stream | None = None
        self._pool: object = None

    def room(self, num_tokens: int, decode_lens: Sequence[int], num_chunks: int, num_logits: int) -> Room | None:
        """Of the graph that has a step's place; None: none has.

        Args:
            num_tokens: of the step.
            decode_lens: keys of each sequence that decodes.
            num_chunks: of prompts.
            num_logits: rows that are asked for.
        """
        parts = len(decode_lens) + num_chunks
        few = max(parts, num_logits) <= FEW_PARTS and max(decode_lens, default=0) <= _LONG_DECODE
        rows = num_tokens if few else max(num_tokens, num_logits)  # several answers to a prompt ask for the same row
        if rows > BUCKETS[-1] or max(parts, num_logits) > len(self._logits_NV):
            return None
        tokens = min(n for n in BUCKETS if n >= rows)
        if few:
            return self._few(tokens)
        return self._many(tokens, FEW_PARTS if num_chunks <= FEW_PARTS else len(self._logits_NV))

    def _few(self, tokens: int) -> Room:
        return Room(tokens, 0, FEW_PARTS, FEW_PARTS)

    def _many(self, tokens: int, parts: int) -> Room:
        return Room(tokens, min(tokens, self._max_seqs), parts, min(tokens, len(self._logits_NV)))

    @property
    def missing(self) -> list[Room]:
        """What is still to be captured: graphs that every server wants, and of the others what the last step had."""
        rooms = [room for room in self._usual if room not in self._graphs]
        return rooms if self.wanted is None or self.wanted in rooms else [self.wanted, *rooms]

    def _compute(self, room: Room, num_layers: int | None = None) -> None:
        staged, n, p = self._staged, room.tokens, room.parts
        rows_T, positions_T = staged.rows_T[:n], staged.positions_T[:n]
        tokens_T = self._tokens_RL[rows_T, positions_T.clamp(min=0)]
        chunks = Chunks(staged.rows_P[:p], staged.starts_P1[: p + 1], staged.contexts_P[:p])
        decodes_S = staged.decodes_T[: room.decodes] if room.decodes else None
        asked_N = staged.logits_rows_N[: room.logits]
        logits_NV = self._forward(tokens_T, rows_T, positions_T, decodes_S, chunks, asked_N, num_layers)
        self._logits_NV[: room.logits].copy_(logits_NV)

    @torch.no_grad()
    def enqueue(self, room: Room, num_layers: int | None = None) -> None:
        """A step of padding, of so many layers at most (None: all)."""
        none = torch.zeros(3, 1, dtype=torch.int64, device=self._tokens_RL.device)
        self._stage(room, none[0], none[0] - 1, 0, none, none[0])
        self._compute(room, num_layers)

    def _stage(
        self,
        room: Room,
        rows_T: torch.Tensor,
        positions_T: torch.Tensor,
        num_decodes: int,
        chunks_3P: torch.Tensor,
        logits_rows_N: torch.Tensor | None,
    ) -> None:
        self._staged.stage(
            room.tokens, rows_T, positions_T, num_decodes, chunks_3P, logits_rows_N, decodes_are_parts=not room.decodes
        )

    @torch.no_grad()
    def capture(self, room: Room) -> None:
        """Makes one graph, on padding; see `FusedDecoder.capture`."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._tokens_RL.device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream(self._tokens_RL.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self.enqueue(room)
            self._stream.synchronize()
            graph = record(lambda: self._compute(room), self._pool, self._stream, self._tp)
        current.wait_stream(self._stream)
        self._graphs[room] = graph
        self.wanted = None

    def close(self) -> None:
        """Drops the graphs; see `FusedDecoder.close`."""
        self._graphs.clear()

    def __call__(
        self,
        room: Room,
        rows_T: torch.Tensor,
        positions_T: torch.Tensor,
        num_decodes: int,
        chunks_3P: torch.Tensor,
        logits_rows_N: torch.Tensor | None,
    ) -> torch.Tensor:
        """Runs a step: by the graph; where that is still to be captured, by the same kernels, one by one, on the same
        padding. Arguments but the first, from `room`, as `StepInputs` has them.

        Returns:
            float32 logits [N, V], overwritten by the next call.
        """
        num_logits = len(rows_T) if logits_rows_N is None else len(logits_rows_N)
        assert num_logits <= room.logits, "logits of an earlier step would be returned"
        self._stage(room, rows_T, positions_T, num_decodes, chunks_3P, logits_rows_N)
        graph = self._graphs.get(room)
        if graph is not None:
            graph.replay()
        else:
            self.wanted = None if room in self._graphs else room
            self._compute(room)
        return self._logits_NV[:num_logits]

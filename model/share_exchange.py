"""Rows between ranks while products are made, by the copy engines: no multiprocessor waits for a link.

Each rank keeps a share of a step's rows. A product with all rows begins with the rank's own and goes on with the
others' in the order in which they are fetched; a product whose sums over the ranks are wanted makes the others' rows
first, and sends each while the next is made. NCCL's kernels take multiprocessors from the products instead, and its
copies through buffers memory bandwidth.

What others read or write is there twice, and used in turn: it is written again after a barrier that the others reach
only when they have read it.

Shape suffixes: T tokens, S rows of a share, D residual width, N columns, P parts of a sum.
"""

from __future__ import annotations

import torch

from tpserve.model.kernels.mixed import matmul
from tpserve.model.matrix import Matrix
from tpserve.model.parallel import TensorParallel
from tpserve.model.reachable import reachable

_GATHERED, _SENT = 0, 1  # channels of barriers
_MIN_TILES = 400  # of 128 x 256, that keep all multiprocessors busy a few times over: of fewer, a product is not cut


class ShareExchange:
    """Memory that the ranks of a group reach, and a stream for what moves.

    Args:
        tp: the group, of two ranks at least.
        rows: of the largest step.
        dim: D.
        dtype: of normed rows and partial sums.
        device: of this rank.

    Raises:
        RuntimeError: the ranks cannot reach each other's memory.
    """

    def __init__(self, tp: TensorParallel, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        size = tp.size
        self._tp, self._rows, share = tp, rows, -(-rows // size)
        self._x_2SD, self._x_handle = reachable(tp, 2, share, dim, dtype=dtype, device=device)
        self._parts_2PSD, self._parts_handle = reachable(tp, 2, size, share, dim, dtype=dtype, device=device)
        self._theirs = [self._x_handle.get_buffer(peer, (2, share, dim), dtype) for peer in range(size)]
        self._to = [self._parts_handle.get_buffer(peer, (2, size, share, dim), dtype) for peer in range(size)]
        self._gathered_TD = torch.empty(size * share, dim, dtype=dtype, device=device)
        self._made_2SD = torch.empty(2, share, dim, dtype=dtype, device=device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._x_turn, self._parts_turn = 0, 0

    @classmethod
    def make(
        cls, tp: TensorParallel, rows: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> ShareExchange | None:
        """None on a single rank, and, on all ranks alike, where one cannot reach another's memory."""
        if tp.size == 1 or device.type != "cuda":
            return None
        return tp.made_by_all(lambda: cls(tp, rows, dim, dtype, device), device)

    def fits(self, rows: int) -> bool:
        """Whether a step of so many rows is no larger than the largest."""
        return rows <= self._rows

    def own(self, share: int) -> torch.Tensor:
        """[S, D]: where this rank puts its normed rows, for the next `times`."""
        self._x_turn ^= 1
        return self._x_2SD[self._x_turn, :share]

    def times(self, w_ND: Matrix, share: int, num_rows: int) -> torch.Tensor:
        """All ranks' rows times wᵀ, [T, N].

        Args:
            w_ND: the weight.
            share: S.
            num_rows: T, at most the ranks' shares together.
        """
        size, rank, n = self._tp.size, self._tp.rank, w_ND.shape[0]
        main, turn = torch.cuda.current_stream(), self._x_turn
        gathered_TD = self._gathered_TD[: size * share]
        order = [(rank + i) % size for i in range(size)]
        came: dict[int, torch.cuda.Event] = {}
        self._stream.wait_stream(main)  # the rank's rows are there, and what was gathered before has been read
        with torch.cuda.stream(self._stream):
            gathered_TD[rank * share : (rank + 1) * share].copy_(self._x_2SD[turn, :share])
            self._x_handle.barrier(channel=_GATHERED)
            for peer in order[1:]:
                gathered_TD[peer * share : (peer + 1) * share].copy_(self._theirs[peer][turn, :share])
                came[peer] = self._stream.record_event()
        if share * n < _MIN_TILES * 128 * 256:
            main.wait_stream(self._stream)
            return matmul(gathered_TD[:num_rows], w_ND)
        y_TN = gathered_TD.new_empty(num_rows, n)
        for peer in order:
            part = slice(peer * share, min((peer + 1) * share, num_rows))
            if peer == rank:
                source = self._x_2SD[turn, : max(0, part.stop - part.start)]
            else:
                main.wait_event(came[peer])
                source = gathered_TD[part]
            if len(source):
                matmul(source, w_ND, y_TN[part])
        return y_TN

    def parts(self, y_TN: torch.Tensor, w_DN: Matrix, share: int) -> torch.Tensor:
        """[P, S, D]: of this rank's rows of y · wᵀ, each rank's part of the sum; good until the next call.

        Args:
            y_TN: all rows, this rank's columns.
            w_DN: the weight.
            share: S.
        """
        size, rank = self._tp.size, self._tp.rank
        main = torch.cuda.current_stream()
        self._parts_turn ^= 1
        turn = self._parts_turn
        sent: list[torch.cuda.Event | None] = [None, None]
        for i in range(1, size + 1):
            peer = (rank + i) % size
            part_TN = y_TN[peer * share : (peer + 1) * share]
            if not len(part_TN):
                continue
            if peer == rank:
                matmul(part_TN, w_DN, self._parts_2PSD[turn, rank, : len(part_TN)])
                continue
            made_SD, last = self._made_2SD[i % 2, : len(part_TN)], sent[i % 2]
            if last is not None:
                main.wait_event(last)
            matmul(part_TN, w_DN, made_SD)
            self._stream.wait_stream(main)
            with torch.cuda.stream(self._stream):
                self._to[peer][turn, rank, : len(part_TN)].copy_(made_SD)
                sent[i % 2] = self._stream.record_event()
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            self._parts_handle.barrier(channel=_SENT)
        main.wait_stream(self._stream)
        return self._parts_2PSD[turn, :, :share]

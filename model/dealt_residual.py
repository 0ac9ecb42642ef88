"""The residual stream of many tokens, dealt out to the ranks, and its sums behind other work.

A sum over ranks is a reduce-scatter and an all-gather. Between the two, each rank adds its share of the tokens to the
residual stream and norms them, so nobody does that for all tokens (Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models", 2022, section 4.2). Both run on a stream of their own, by a communicator
that takes few of the multiprocessors: whoever asks for the sum computes something else in the meantime.

Shape suffixes: T tokens, D residual width, N a rank's columns of a product's left side or asked tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from tpserve.model.kernels import rows
from tpserve.model.kernels.mixed import matmul
from tpserve.model.matrix import Matrix
from tpserve.model.parallel import TensorParallel, all_gather, reduce_scatter


class DealtResidual:
    """A part of a step's tokens.

    Args:
        residual_TD: float32, alike on all ranks; this rank goes on with its share of the rows, in place.
        tp: this rank's place.
        group: for the collectives behind other work.
        stream: where they run.
        eps: of the norms.
    """

    def __init__(
        self,
        residual_TD: torch.Tensor,
        tp: TensorParallel,
        group: dist.ProcessGroup,
        stream: torch.cuda.Stream,
        eps: float,
    ) -> None:
        self._group, self._stream, self._eps = group, stream, eps
        self._tokens = len(residual_TD)
        self._share = -(-self._tokens // tp.size)
        self._padded = self._share * tp.size
        self.begin = tp.rank * self._share
        self._own_TD = residual_TD[self.begin : self.begin + self._share]
        self.end = self.begin + len(self._own_TD)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._normed_TD: torch.Tensor | None = None
        self._kept: tuple[torch.Tensor, ...] = ()

    def start_adding(self, x_TN: torch.Tensor, w_DN: Matrix, gain_D: torch.Tensor) -> None:
        """residual += the sum over ranks of x · wᵀ; `normed` then has the norm by this gain, for all tokens."""
        y_TD = x_TN.new_empty(self._padded, w_DN.shape[0])
        matmul(x_TN, w_DN, y_TD[: self._tokens])
        normed_TD = torch.empty_like(y_TD)
        self._stream.wait_stream(torch.cuda.current_stream(y_TD.device))
        with torch.cuda.stream(self._stream):
            own_TD, x_TD = (y_TD.new_empty(self._share, y_TD.shape[1]) for _ in range(2))
            reduce_scatter(own_TD, y_TD, group=self._group)
            n = len(self._own_TD)
            rows.add_norm(own_TD[:n], self._own_TD, gain_D, self._eps, x_TD[:n])
            all_gather(normed_TD, x_TD, group=self._group)
            self._done.record(self._stream)
        # The allocator may give memory of this stream to others only after `normed` has waited.
        self._normed_TD, self._kept = normed_TD, (y_TD, own_TD, x_TD)

    def normed(self) -> torch.Tensor:
        """[T, D], in the weights' type; the current stream waits, this process does not."""
        assert self._normed_TD is not None
        torch.cuda.current_stream(self._normed_TD.device).wait_event(self._done)
        normed_TD, self._normed_TD, self._kept = self._normed_TD[: self._tokens], None, ()
        return normed_TD


def residual_of(
    rows_N: torch.Tensor, residual_TD: torch.Tensor, first: list[int], parts: list[DealtResidual], tp: TensorParallel
) -> torch.Tensor:
    """The asked tokens' residual stream, on all ranks alike; float32 [N, D].

    Args:
        rows_N: of all tokens.
        residual_TD: of which each rank has its shares of the parts right.
        first: each part's first token.
        parts: see `DealtResidual`.
        tp: the ranks.
    """
    own_N = torch.zeros_like(rows_N, dtype=torch.bool)
    for lo, part in zip(first, parts, strict=True):
        own_N |= (rows_N >= lo + part.begin) & (rows_N < lo + part.end)
    return tp.all_reduce(torch.where(own_N[:, None], residual_TD[rows_N], 0.0))

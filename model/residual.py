"""The residual stream of a step of many tokens, and the sums over ranks that go into it.

Shape suffixes: T tokens, D residual width, N columns of a product's input on this rank or rows that are asked for, S
rows that this rank keeps.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from tpserve.model.kernels import rows
from tpserve.model.kernels.mixed import matmul
from tpserve.model.llama import Llama
from tpserve.model.matrix import Matrix
from tpserve.model.parallel import TensorParallel, all_gather
from tpserve.model.symmetric_sum import SymmetricSum

MIN_DEALT_ROWS = 1024  # below, two collectives cost more than the norms of all rows


class Residual:
    """All of it on every rank; float32.

    Args:
        model: whose embedding begins it.
        tokens_T: of the step.
        tp: this rank's place.
        symmetric: adds up the sums that fit it; None: NCCL does all.
    """

    def __init__(
        self, model: Llama, tokens_T: torch.Tensor, tp: TensorParallel, symmetric: SymmetricSum | None
    ) -> None:
        self._begin(model.tok_embeddings(tokens_T).float(), tp, symmetric)

    def _begin(self, residual_TD: torch.Tensor, tp: TensorParallel, symmetric: SymmetricSum | None) -> None:
        self._residual_TD, self._tp, self._symmetric = residual_TD, tp, symmetric

    def norm(self, gain_D: torch.Tensor, eps: float) -> torch.Tensor:
        """RMSNorm of all rows, in the gain's type."""
        return rows.add_norm(None, self._residual_TD, gain_D, eps)

    def add(self, x_TN: torch.Tensor, w_DN: Matrix, gain_D: torch.Tensor, eps: float) -> torch.Tensor:
        """Adds the sum over ranks of x · wᵀ; the norm of all rows."""
        if self._symmetric is not None and self._symmetric.fits(len(x_TN)):
            y_TD = matmul(x_TN, w_DN, self._symmetric.buffer(len(x_TN)))
            self._symmetric.sum(y_TD)
        else:
            y_TD = matmul(x_TN, w_DN)
            if self._tp.size > 1:
                self._tp.all_reduce(y_TD)
        return rows.add_norm(y_TD, self._residual_TD, gain_D, eps)

    def only(self, rows_N: torch.Tensor) -> Residual:
        """Of some rows."""
        return _made(self._residual_TD[rows_N], self._tp, self._symmetric)


class DealtResidual(Residual):
    """Each rank keeps a share of the rows, adds to them, and norms them: a share of that work, too.

    A reduce-scatter and an all-gather move as much as an all-reduce. The last rank's share is padded with rows that
    nobody reads.
    """

    def __init__(
        self, model: Llama, tokens_T: torch.Tensor, tp: TensorParallel, symmetric: SymmetricSum | None
    ) -> None:
        self._num_rows, share = len(tokens_T), -(-len(tokens_T) // tp.size)
        tokens_T = torch.nn.functional.pad(tokens_T, (0, share * tp.size - len(tokens_T)))
        own = slice(tp.rank * share, (tp.rank + 1) * share)
        self._begin(model.tok_embeddings(tokens_T[own]).float(), tp, symmetric)

    def norm(self, gain_D: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Residual`."""
        return self._gathered(super().norm(gain_D, eps))

    def add(self, x_TN: torch.Tensor, w_DN: Matrix, gain_D: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Residual`."""
        share, size = len(self._residual_TD), self._tp.size
        partial = x_TN.new_empty(share * size, w_DN.shape[0])
        matmul(x_TN, w_DN, partial[: self._num_rows])
        y_SD = x_TN.new_empty(share, w_DN.shape[0])
        dist.reduce_scatter_tensor(y_SD, partial, group=self._tp.group)
        return self._gathered(rows.add_norm(y_SD, self._residual_TD, gain_D, eps))

    def only(self, rows_N: torch.Tensor) -> Residual:
        """See `Residual`: each rank gives the rows that it keeps."""
        at_N = rows_N - self._tp.rank * len(self._residual_TD)
        mine_N = (at_N >= 0) & (at_N < len(self._residual_TD))
        kept_ND = self._residual_TD[at_N.clamp(0, len(self._residual_TD) - 1)]
        whole_ND = torch.where(mine_N[:, None], kept_ND, 0.0)
        return _made(self._tp.all_reduce(whole_ND), self._tp, self._symmetric)

    def _gathered(self, x_SD: torch.Tensor) -> torch.Tensor:
        x_TD = x_SD.new_empty(len(x_SD) * self._tp.size, x_SD.shape[1])
        all_gather(x_TD, x_SD, group=self._tp.group)
        return x_TD[: self._num_rows]


def _made(residual_TD: torch.Tensor, tp: TensorParallel, symmetric: SymmetricSum | None) -> Residual:
    made = Residual.__new__(Residual)
    made._begin(residual_TD, tp, symmetric)
    return made

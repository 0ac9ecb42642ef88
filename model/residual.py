"""The residual stream of a step of many tokens, and the sums over ranks that go into it.

Shape suffixes: T tokens, D residual width, N columns of a product's input on this rank or rows that are asked for, S
rows that this rank keeps.
"""

from __future__ import annotations

import torch

from tpserve.model.head import head_product
from tpserve.model.kernels import rows
from tpserve.model.kernels.mixed import matmul
from tpserve.model.kernels.row_exchange import RowExchange
from tpserve.model.llama import Llama
from tpserve.model.matrix import Matrix
from tpserve.model.parallel import TensorParallel, all_gather, reduce_scatter
from tpserve.model.share_exchange import ShareExchange
from tpserve.model.tens_of_rows import TensOfRows

MIN_DEALT_ROWS = 1024  # below, two collectives cost more than the norms of all rows


class Residual:
    """All of it on every rank; float32.

    Args:
        model: whose embedding begins it, and whose first norm is made of it.
        tokens_T: of the step.
        tp: this rank's place.
        gain_D: of the first norm.
        products: who makes them.

    Attributes:
        x_TD: the normed rows, but of `OverlappedResidual`.
    """

    x_TD: torch.Tensor

    def __init__(
        self, model: Llama, tokens_T: torch.Tensor, tp: TensorParallel, gain_D: torch.Tensor, products: TensOfRows
    ) -> None:
        self._residual_TD, self._tp = model.tok_embeddings(tokens_T).float(), tp
        self._eps, self._products = model.args.norm_eps, products
        self._begin(gain_D)

    def _begin(self, gain_D: torch.Tensor) -> None:
        self.x_TD = rows.add_norm(None, self._residual_TD, gain_D, self._eps, pdl=self._products.pdl)

    def logits(self, head_VD: torch.Tensor) -> torch.Tensor:
        """The normed rows times the head's wᵀ, float32 [T, V]."""
        return head_product(self.x_TD, head_VD)

    def add(self, y_TN: torch.Tensor, w_DN: Matrix, gain_D: torch.Tensor) -> None:
        """Adds the sum over ranks of y · wᵀ, and makes the next norm."""
        sum_TD = self._products.product(y_TN, w_DN, in_parts=self._tp.size == 1)
        if self._tp.size > 1:
            self._tp.all_reduce(sum_TD)
        self.x_TD = rows.add_norm(sum_TD, self._residual_TD, gain_D, self._eps, pdl=self._products.pdl)

    def only(self, rows_N: torch.Tensor) -> Residual:
        """Of some rows, before an `add`."""
        return self._whole(self._residual_TD[rows_N])

    def _whole(self, residual_ND: torch.Tensor) -> Residual:
        made = Residual.__new__(Residual)
        made._residual_TD, made._tp, made._eps, made._products = residual_ND, self._tp, self._eps, self._products
        return made

    def _collected(self, kept_ND: torch.Tensor, rows_N: torch.Tensor, share: int) -> torch.Tensor:
        """Rows of all ranks, each of the rank whose share it is in; `kept_ND`: this rank's, where they are its own."""
        mine_N = rows_N // share == self._tp.rank
        return self._tp.all_reduce(torch.where(mine_N[:, None], kept_ND, 0.0))


class ExchangedResidual(Residual):
    """Sums, residual and norms are made by `RowExchange`: each rank's share of the rows is the only right one."""

    def __init__(
        self, model: Llama, tokens_T: torch.Tensor, tp: TensorParallel, gain_D: torch.Tensor, products: TensOfRows,
        exchange: RowExchange,
    ) -> None:  # fmt: skip
        super().__init__(model, tokens_T, tp, gain_D, products)
        self._exchange = exchange

    def add(self, y_TN: torch.Tensor, w_DN: Matrix, gain_D: torch.Tensor) -> None:
        """See `Residual`."""
        self._products.product(y_TN, w_DN, self._exchange.partial_SD[: len(y_TN)])
        self.x_TD = self._exchange.add_norm(self._residual_TD, gain_D, self._eps, len(y_TN))

    def only(self, rows_N: torch.Tensor) -> Residual:
        """See `Residual`."""
        share = -(-len(self._residual_TD) // self._tp.size)
        whole = self._whole(self._collected(self._residual_TD[rows_N], rows_N, share))
        if not self._exchange.fits(len(rows_N)):  # several draws may ask for the same row
            return whole
        made = ExchangedResidual.__new__(ExchangedResidual)
        made.__dict__ |= whole.__dict__
        made._exchange = self._exchange
        return made


class DealtResidual(Residual):
    """Each rank keeps a share of the rows, adds to them, and norms them: a share of that work, too.

    A reduce-scatter and an all-gather move as much as an all-reduce. The last rank's share is padded with rows that
    nobody reads.
    """

    def __init__(
        self, model: Llama, tokens_T: torch.Tensor, tp: TensorParallel, gain_D: torch.Tensor, products: TensOfRows
    ) -> None:
        self._num_rows, self._share = len(tokens_T), -(-len(tokens_T) // tp.size)
        tokens_T = torch.nn.functional.pad(tokens_T, (0, self._share * tp.size - len(tokens_T)))
        first = tp.rank * self._share
        super().__init__(model, tokens_T[first : first + self._share], tp, gain_D, products)

    def _begin(self, gain_D: torch.Tensor) -> None:
        self._gather(rows.add_norm(None, self._residual_TD, gain_D, self._eps))

    def add(self, y_TN: torch.Tensor, w_DN: Matrix, gain_D: torch.Tensor) -> None:
        """See `Residual`."""
        partial = y_TN.new_empty(self._share * self._tp.size, w_DN.shape[0])
        matmul(y_TN, w_DN, partial[: self._num_rows])
        sum_SD = y_TN.new_empty(self._share, w_DN.shape[0])
        reduce_scatter(sum_SD, partial, group=self._tp.group)
        self._gather(rows.add_norm(sum_SD, self._residual_TD, gain_D, self._eps))

    def only(self, rows_N: torch.Tensor) -> Residual:
        """See `Residual`: whole again, on every rank."""
        at_N = (rows_N - self._tp.rank * self._share).clamp(0, self._share - 1)
        return self._whole(self._collected(self._residual_TD[at_N], rows_N, self._share))

    def _gather(self, x_SD: torch.Tensor) -> None:
        x_TD = x_SD.new_empty(len(x_SD) * self._tp.size, x_SD.shape[1])
        all_gather(x_TD, x_SD, group=self._tp.group)
        self.x_TD = x_TD[: self._num_rows]


class OverlappedResidual(DealtResidual):
    """Dealt, and moved by `ShareExchange` while products are made: rows of another rank are multiplied as they come
    (`times`), and rows for another rank leave as soon as they are made."""

    def __init__(
        self, model: Llama, tokens_T: torch.Tensor, tp: TensorParallel, gain_D: torch.Tensor, products: TensOfRows,
        exchange: ShareExchange,
    ) -> None:  # fmt: skip
        self._exchange = exchange
        super().__init__(model, tokens_T, tp, gain_D, products)

    def _begin(self, gain_D: torch.Tensor) -> None:
        x_SD = self._exchange.own(self._share)
        rows.add_norm(None, self._residual_TD, gain_D, self._eps, x_SD)

    def times(self, w_ND: Matrix) -> torch.Tensor:
        """The normed rows times wᵀ, [T, N]."""
        return self._exchange.times(w_ND, self._share, self._num_rows)

    def add(self, y_TN: torch.Tensor, w_DN: Matrix, gain_D: torch.Tensor) -> None:
        """See `Residual`."""
        parts_PSD = self._exchange.parts(y_TN, w_DN, self._share)
        rows.add_norm(parts_PSD, self._residual_TD, gain_D, self._eps, self._exchange.own(self._share))


def residual_stream(
    model: Llama,
    tokens_T: torch.Tensor,
    tp: TensorParallel,
    gain_D: torch.Tensor,
    products: TensOfRows,
    few: RowExchange | None,
    many: ShareExchange | None,
) -> Residual:
    """The kind that is fastest for so many tokens; arguments as of the kinds."""
    if few is not None and few.fits(len(tokens_T)):
        return ExchangedResidual(model, tokens_T, tp, gain_D, products, few)
    if tp.size > 1 and len(tokens_T) >= MIN_DEALT_ROWS:
        if many is not None and many.fits(len(tokens_T)):
            return OverlappedResidual(model, tokens_T, tp, gain_D, products, many)
        return DealtResidual(model, tokens_T, tp, gain_D, products)
    return Residual(model, tokens_T, tp, gain_D, products)

"""Products of steps of more rows than `kernels/linear.py` takes, and what follows them: each by what is fastest.

Up to some tens of rows on Hopper GPUs: kernels that read the weights as fast as memory gives them, and end with
what follows (`rows_product.py`, `rows_pairs.py`). Otherwise cuBLAS, or of fewer bits `mixed.py`'s, and a kernel of its
own for that.

Shape suffixes: S rows of the step, K and N as in y[S, N] = x[S, K] @ w[N, K]ᵀ, P parts of a sum, H query and K
key/value heads of this rank, E head width, D residual width, F feed-forward width of this rank.
"""

from __future__ import annotations

from types import ModuleType

import torch

from tpserve.model.kernels import has_gluon, is_hopper, pointwise
from tpserve.model.kernels.mixed import matmul
from tpserve.model.kernels.norm import Normed
from tpserve.model.kernels.rope import rope_and_write
from tpserve.model.kernels.rows_tile import INT4_GROUP, RowsTile, choose_rows_tile
from tpserve.model.matrix import ROW_SCALES, Matrix


class TensOfRows:
    """Of one device and type.

    Args:
        device, dtype: of the rows.

    Attributes:
        pdl: whether kernels are launched before the ones in front have ended.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.pdl = device.type == "cuda"
        self._product: ModuleType | None = None
        self._pairs: ModuleType | None = None
        if has_gluon() and is_hopper(device) and dtype.itemsize == 2:
            from tpserve.model.kernels import rows_pairs, rows_product

            self._product, self._pairs = rows_product, rows_pairs
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count

    def _tile(self, s: int, w: Matrix, **how: bool) -> RowsTile | None:
        """None: another kernel (`mixed.matmul`)."""
        if self._product is None or w.group not in (0, ROW_SCALES, INT4_GROUP):
            return None
        bits = 4 if w.group > 0 else 8 * w.q.element_size()
        torchs = w.scheme == "fp8"
        return choose_rows_tile(s, *w.shape, self._processors, bits=bits, torchs=torchs, **how)

    def product(
        self, x_SK: torch.Tensor, w: Matrix, out_SN: torch.Tensor | None = None, *, in_parts: bool = False
    ) -> torch.Tensor:
        """x @ wᵀ.

        Args:
            x_SK: contiguous.
            out_SN: where to, contiguous; None: new memory.
            in_parts: whether the sums may be left in float32 parts, in new memory.

        Returns:
            [S, N] or [P, S, N].
        """
        tile = self._tile(len(x_SK), w, in_parts=in_parts)
        if self._product is None or tile is None:
            return matmul(x_SK, w, out_SN)
        if tile.parts > 1:
            out_SN = torch.empty(tile.parts, len(x_SK), w.shape[0], dtype=torch.float32, device=x_SK.device)
        elif out_SN is None:
            out_SN = x_SK.new_empty(len(x_SK), w.shape[0])
        self._product.rows_product(x_SK, w, out_SN, tile, pdl=self.pdl)
        return out_SN

    def qkv(
        self,
        x_SD: torch.Tensor,
        w_ND: Matrix,
        q_SHE: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        rope_PC2: torch.Tensor,
        positions_S: torch.Tensor,
        slots_S: torch.Tensor,
        normed: Normed | None = None,
        parts: int = 0,
    ) -> None:
        """Rotated queries to `q_SHE`, rotated keys and values to the cache slots `slots_S` (-1: nowhere).

        Args:
            x_SD: contiguous.
            w_ND: the rows of wq, wk and wv, one below the other.
            positions_S: int64; -1: padding. No kernel since the last one that was launched normally may have written
                them.
            slots_S: int64.
            normed, parts: of the norm that x still lacks, and how many parts its sums have; None: none.
        """
        tile = self._tile(len(x_SD), w_ND)
        where = (rope_PC2, positions_S, slots_S, normed, parts)
        if self._pairs is not None and tile is not None and self._pairs.fits_qkv(tile, q_SHE, k_cache):
            self._pairs.qkv(x_SD, w_ND, q_SHE, k_cache, v_cache, *where, tile, pdl=self.pdl)
            return
        rope_and_write(self.product(x_SD, w_ND), q_SHE, k_cache, v_cache, *where, pdl=self.pdl)

    def gate_up(
        self, x_SD: torch.Tensor, w_ND: Matrix, out_SF: torch.Tensor, normed: Normed | None = None, parts: int = 0
    ) -> None:
        """SiLU(x @ w1ᵀ) · (x @ w3ᵀ).

        Args:
            x_SD: contiguous.
            w_ND: w1 above w3.
            out_SF: contiguous.
            normed, parts: as for `qkv`.
        """
        tile = self._tile(len(x_SD), w_ND, with_end=True)
        if self._pairs is not None and tile is not None:
            self._pairs.gate_up(x_SD, w_ND, out_SF, normed, parts, tile, pdl=self.pdl)
            return
        pointwise.silu_mul(self.product(x_SD, w_ND), out_SF, normed, parts, pdl=self.pdl)

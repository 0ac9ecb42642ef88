"""At which tensor-parallel (TP) size a group goes on that cannot come back at its own: bookkeeping only."""

from __future__ import annotations

from tpserve.model.args import ModelArgs

_MAX_FAILED_STARTS = 2


def largest_fitting_size(args: ModelArgs, most: int) -> int | None:
    """The largest TP size up to `most` that the model can be split for; None: there is none."""
    size = min(most, args.n_heads, args.ffn_hidden_dim)
    return size if size > 0 else None


class TensorParallelSize:
    """The size of the next group.

    Args:
        args: the model.
        size: as configured.
        elastic: whether it may shrink.

    Attributes:
        size: of the next group.
    """

    def __init__(self, args: ModelArgs, size: int, elastic: bool) -> None:
        self.size = size
        self._args, self._elastic = args, elastic
        self._has_served = False
        self._failed_starts = 0

    def served(self) -> None:
        """A group of this size became ready."""
        self._has_served, self._failed_starts = True, 0

    def devices_missing(self, num_devices: int) -> bool:
        """A group found fewer devices than ranks; whether there is a size to go on with."""
        return self._elastic and self._shrink(min(num_devices, self.size - 1))

    def failed_to_start(self) -> bool:
        """A group ended before it was ready; whether the next one will be smaller.

        That is after two in a row, and only if groups had served before: a first start fails for other reasons.
        """
        self._failed_starts += 1
        if not (self._elastic and self._has_served and self._failed_starts >= _MAX_FAILED_STARTS):
            return False
        return self._shrink(self.size - 1)

    def _shrink(self, most: int) -> bool:
        size = largest_fitting_size(self._args, most)
        if size is None:
            return False
        self.size, self._failed_starts = size, 0
        return True

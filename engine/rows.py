"""The running sequences as the device knows them: a row each, written when it changes, read by index every step.

Rows hold what would otherwise travel to the device every step: tokens, block tables. A step draws its tokens straight
into the rows, where the next one reads them: the host need not know them in between.

Shape suffixes: R rows, L positions, B blocks of a table, N entries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Values
from typing import Any

import numpy as np
import torch

from tpserve.engine.sequence import Sequence
from tpserve.engine.step import StepPlan

Array = np.ndarray[Any, Any]


class BatchState:
    """The device's side: tokens, tables, and the one parameter that changes with the tokens drawn.

    Only touched by jobs of the device queue.

    Args:
        num_rows: sequences that may run at once.
        max_len: longest sequence.
        max_blocks: its blocks.
        device: of the model.
    """

    def __init__(self, num_rows: int, max_len: int, max_blocks: int, device: torch.device) -> None:
        # One more: the profiling pass draws a token after the longest sequence.
        self.tokens_RL = torch.zeros(num_rows, max_len + 1, dtype=torch.int64, device=device)
        self.tables_RB = torch.zeros(num_rows, max_blocks, dtype=torch.int64, device=device)
        self.top_p_R = torch.ones(num_rows, dtype=torch.float64, device=device)


class Uploader:
    """Moves small host arrays to the device without waiting for it.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pins = device.type == "cuda"

    def __call__(self, values: Array | Values[Any], dtype: Any = None) -> torch.Tensor:
        """A tensor of its own on the device; pinned memory is given back by torch once the copy is done."""
        host = torch.from_numpy(np.array(values, dtype=dtype))
        return host.pin_memory().to(self.device, non_blocking=True) if self._pins else host


class Parcel:
    """Arrays of integers that travel to the device together: one copy of thousands takes as long as one of ten. To a
    CPU nothing travels."""

    def __init__(self) -> None:
        self._arrays: list[Array] = []

    def add(self, values: Array | Values[Any]) -> int:
        """Puts an array in; returns its place among what `send` returns."""
        self._arrays.append(np.asarray(values, dtype=np.int64))
        return len(self._arrays) - 1

    def send(self, upload: Uploader) -> list[torch.Tensor]:
        """The arrays on the device, int64, in their shapes; the caller must not change them any more."""
        if upload.device.type == "cpu":
            return [torch.from_numpy(array) for array in self._arrays]
        sent = upload(np.concatenate([array.ravel() for array in self._arrays]))
        parts = sent.split_with_sizes([array.size for array in self._arrays])
        return [
            part if array.ndim == 1 else part.view(array.shape) for part, array in zip(parts, self._arrays, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Changes:
    """What a plan changes in the rows, as it was when the plan was made: the host goes on changing its sequences.

    Attributes:
        blocks: place in the parcel of [3, N]: row, place, block.
        loads, writes: likewise: row, position, token; the writes come last.
        top_p: by row, of those that decay.
    """

    blocks: int | None
    loads: int | None
    writes: int | None
    top_p: dict[int, float]

    @classmethod
    def of(cls, plan: StepPlan, parcel: Parcel) -> Changes:
        """Reads a plan; sequences that lost their row since are left out."""
        loads = [(seq, seq.row) for seq in plan.loads if seq.row is not None]
        loaded = {row for _, row in loads}
        # A table that is loaded is the newest already.
        blocks = [
            (seq.row, place, block)
            for seq, place, block in plan.new_blocks
            if seq.row is not None and seq.row not in loaded
        ]
        writes = [(seq.row, position, token) for seq, position, token in plan.writes if seq.row is not None]
        tables = [_placed(row, seq.block_table) for seq, row in loads]
        tokens = [_placed(row, seq.token_ids) for seq, row in loads]
        if blocks:
            tables.append(np.array(blocks, dtype=np.int64).T)
        return cls(
            parcel.add(np.concatenate(tables, axis=1)) if tables else None,
            parcel.add(np.concatenate(tokens, axis=1)) if tokens else None,
            parcel.add(np.array(writes, dtype=np.int64).T) if writes else None,
            {row: _top_p_now(seq) for seq, row in loads if seq.params.top_p_decay < 1},
        )

    def apply(self, state: BatchState, sent: list[torch.Tensor]) -> None:
        """Runs on the device; `sent` is what the parcel became there."""
        if self.blocks is not None:
            row_N, place_N, block_N = sent[self.blocks]
            state.tables_RB[row_N, place_N] = block_N
        for at in (self.loads, self.writes):
            if at is not None:
                row_N, position_N, token_N = sent[at]
                state.tokens_RL[row_N, position_N] = token_N
        for row, top_p in self.top_p.items():
            state.top_p_R[row].fill_(top_p)


def _placed(row: int, values: list[int]) -> Array:
    """[3, N]: the row, counted places, the values."""
    placed = np.empty((3, len(values)), dtype=np.int64)
    placed[0], placed[1], placed[2] = row, np.arange(len(values)), values
    return placed


def _top_p_now(seq: Sequence) -> float:
    """What `next_top_p` has made of a sequence's top_p, recomputed from its tokens: bit-equal to the device's."""
    params = seq.params
    if params.top_p_decay == 1:
        return params.top_p
    value = params.top_p
    for token in seq.token_ids[seq.num_prompt_tokens :]:
        value = params.top_p if token in params.top_p_reset_ids else max(value * params.top_p_decay, params.top_p_min)
    return value

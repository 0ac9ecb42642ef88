"""The batch as the device knows it: a row a running sequence, written when it changes, read by index every step.

Rows hold what would otherwise travel to the device every step: tokens, block tables, sampling parameters. A step draws
its tokens straight into the rows, where the next one reads them: the host need not know them in between.

Shape suffixes: R rows, L positions, B blocks of a table, N draws of a step, T tokens of a step, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch

from tpserve.engine.sequence import Sequence
from tpserve.engine.step import StepPlan
from tpserve.model.logits import BadWords, Penalties, SamplingBatch, SparseBias
from tpserve.model.sampling import next_top_p

Array = np.ndarray[Any, Any]
_FLOAT32_MAX = float(np.finfo(np.float32).max)


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

    def __call__(self, values: Array | Seq[Any], dtype: Any = None) -> torch.Tensor:
        """A tensor of its own on the device; pinned memory is given back by torch once the copy is done."""
        host = torch.from_numpy(np.array(values, dtype=dtype))
        return host.pin_memory().to(self.device, non_blocking=True) if self._pins else host


@dataclasses.dataclass(frozen=True)
class Changes:
    """What a plan changes in the rows, as it was when the plan was made: the host goes on changing its sequences."""

    loads: list[tuple[int, torch.Tensor, torch.Tensor, float]]  # row, tokens, table, top_p
    blocks: torch.Tensor | None  # [3, n]: row, place, block
    writes: torch.Tensor | None  # [3, n]: row, position, token

    @classmethod
    def of(cls, plan: StepPlan, upload: Uploader) -> Changes:
        """Reads a plan; sequences that lost their row since are left out."""
        loads = [
            (seq.row, upload(seq.token_ids, np.int64), upload(seq.block_table, np.int64), _top_p_now(seq))
            for seq in plan.loads
            if seq.row is not None
        ]
        blocks = [(seq.row, place, block) for seq, place, block in plan.new_blocks if seq.row is not None]
        writes = [(seq.row, position, token) for seq, position, token in plan.writes if seq.row is not None]
        return cls(
            loads,
            upload(list(zip(*blocks, strict=True)), np.int64) if blocks else None,
            upload(list(zip(*writes, strict=True)), np.int64) if writes else None,
        )

    def apply(self, state: BatchState) -> None:
        """Runs on the device."""
        for row, tokens, table, top_p in self.loads:
            state.tokens_RL[row, : len(tokens)] = tokens
            state.tables_RB[row, : len(table)] = table
            state.top_p_R[row].fill_(top_p)
        if self.blocks is not None:
            state.tables_RB[self.blocks[0], self.blocks[1]] = self.blocks[2]
        if self.writes is not None:
            state.tokens_RL[self.writes[0], self.writes[1]] = self.writes[2]


def _top_p_now(seq: Sequence) -> float:
    """What `next_top_p` has made of a sequence's top_p, recomputed from its tokens: bit-equal to the device's."""
    params = seq.params
    if params.top_p_decay == 1:
        return params.top_p
    value = params.top_p
    for token in seq.token_ids[seq.num_prompt_tokens :]:
        value = params.top_p if token in params.top_p_reset_ids else max(value * params.top_p_decay, params.top_p_min)
    return value


@dataclasses.dataclass(frozen=True)
class _Static:
    """Parameters of the drawing rows: the same from step to step while the same sequences draw."""

    rows_N: torch.Tensor
    temperature_N: torch.Tensor
    top_k_N: torch.Tensor
    top_p_N: torch.Tensor
    min_p_N: torch.Tensor
    seed_N: torch.Tensor
    any_random: bool
    any_filter: bool
    any_min_p: bool
    max_top_k: int | None
    penalties: Penalties | None
    bias: SparseBias | None
    bad_words: BadWords | None
    decay: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None
    min_tokens: bool  # some row may not end yet: the bias depends on the position
    reads_history: bool


@dataclasses.dataclass(frozen=True)
class Draws:
    """The draws of one step, ready for the device.

    Attributes:
        seqs: who draws, one a draw.
        positions_N: where the token drawn will stand.
        max_position: the highest of them.
    """

    seqs: list[Sequence]
    positions_N: torch.Tensor
    max_position: int
    static: _Static

    def batch(self, state: BatchState, allowed_NW: torch.Tensor | None) -> SamplingBatch:
        """The sampler's view of the rows; runs on the device."""
        s = self.static
        return SamplingBatch(
            temperature_N=s.temperature_N,
            top_k_N=s.top_k_N,
            top_p_N=s.top_p_N if s.decay is None else state.top_p_R[s.rows_N],
            min_p_N=s.min_p_N,
            seed_N=s.seed_N,
            position_N=self.positions_N,
            any_random=s.any_random,
            any_filter=s.any_filter,
            any_min_p=s.any_min_p,
            history_NL=state.tokens_RL[s.rows_N, : self.max_position] if s.reads_history else None,
            penalties=s.penalties,
            bias=s.bias,
            bad_words=s.bad_words,
            allowed_NW=allowed_NW,
            max_top_k=s.max_top_k,
        )

    def store(self, state: BatchState, tokens_N: torch.Tensor) -> None:
        """Writes the tokens drawn into the rows; runs on the device."""
        s = self.static
        state.tokens_RL[s.rows_N, self.positions_N] = tokens_N
        if s.decay is not None:
            state.top_p_R[s.rows_N] = next_top_p(state.top_p_R[s.rows_N], tokens_N, *s.decay)


class DrawBuilder:
    """Makes `Draws`; keeps what does not change while the same sequences draw.

    Args:
        vocab_size: of the logits.
        upload: to the device.
    """

    def __init__(self, vocab_size: int, upload: Uploader) -> None:
        self._vocab_size, self._upload = vocab_size, upload
        self._seqs: list[Sequence] = []
        self._rows: list[int | None] = []
        self._static: _Static | None = None

    def build(self, seqs: list[Sequence], positions: list[int]) -> Draws:
        """Args:
        seqs: who draws.
        positions: where the tokens will stand.
        """
        rows = [seq.row for seq in seqs]
        if self._static is None or self._static.min_tokens or rows != self._rows or seqs != self._seqs:
            self._static, self._seqs, self._rows = self._make_static(seqs, positions), seqs, rows
        return Draws(seqs, self._upload(positions, np.int64), max(positions), self._static)

    def _make_static(self, seqs: list[Sequence], positions: list[int]) -> _Static:
        upload, params = self._upload, [seq.params for seq in seqs]
        random = [p for p in params if p.temperature > 0]
        filtered = [p for p in random if p.top_k or p.top_p < 1]
        seeds = [seq.seed - 2**64 if seq.seed >= 2**63 else seq.seed for seq in seqs]  # the int64 of the same bits
        penalties = None
        if any(p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty for p in params):
            penalties = Penalties(
                repetition_N=upload([p.repetition_penalty for p in params], np.float32),
                presence_N=upload([p.presence_penalty for p in params], np.float32),
                frequency_N=upload([p.frequency_penalty for p in params], np.float32),
                num_prompt_N=upload([seq.num_prompt_tokens for seq in seqs], np.int64),
            )
        bad_words = self._bad_words(seqs)
        too_short = [position - seq.num_prompt_tokens < seq.params.min_tokens
                     for seq, position in zip(seqs, positions, strict=True)]  # fmt: skip
        return _Static(
            rows_N=upload([seq.row for seq in seqs], np.int64),
            temperature_N=upload([p.temperature for p in params], np.float32),
            top_k_N=upload([p.top_k or self._vocab_size for p in params], np.int64),
            top_p_N=upload([p.top_p for p in params], np.float64),
            min_p_N=upload([p.min_p for p in params], np.float32),
            seed_N=upload(seeds, np.int64),
            any_random=bool(random),
            any_filter=bool(filtered),
            any_min_p=any(p.min_p for p in random),
            max_top_k=max((p.top_k for p in filtered), default=None) if all(p.top_k for p in filtered) else None,
            penalties=penalties,
            bias=self._bias(seqs, too_short),
            bad_words=bad_words,
            decay=self._decay(seqs) if any(p.top_p_decay < 1 for p in random) else None,
            min_tokens=any(too_short),
            reads_history=penalties is not None or bad_words is not None,
        )

    def _bias(self, seqs: list[Sequence], too_short: list[bool]) -> SparseBias | None:
        entries: list[tuple[int, int, float]] = []
        for i, seq in enumerate(seqs):
            # What float32 cannot hold would make numpy warn in the users' logs, or fail where warnings are errors.
            biases = seq.params.logit_bias.items()
            entries += [(i, token, max(-_FLOAT32_MAX, min(bias, _FLOAT32_MAX))) for token, bias in biases]
            entries += [(i, word[0], -math.inf) for word in seq.params.bad_words if len(word) == 1]
            if too_short[i]:
                entries += [(i, token, -math.inf) for token in sorted(seq.stop_token_ids)]
        if not entries:
            return None
        rows, tokens, values = zip(*entries, strict=True)
        return SparseBias(
            self._upload(rows, np.int64), self._upload(tokens, np.int64), self._upload(values, np.float32)
        )

    def _bad_words(self, seqs: list[Sequence]) -> BadWords | None:
        words = [(i, word) for i, seq in enumerate(seqs) for word in seq.params.bad_words if len(word) > 1]
        if not words:
            return None
        width = max(len(word) for _, word in words) - 1
        prefixes = np.full((len(words), width), -1, dtype=np.int64)
        for k, (_, word) in enumerate(words):
            prefixes[k, width - len(word) + 1 :] = word[:-1]
        return BadWords(
            row_B=self._upload([i for i, _ in words], np.int64),
            prefix_BW=self._upload(prefixes),
            prefix_len_B=self._upload([len(word) - 1 for _, word in words], np.int64),
            token_B=self._upload([word[-1] for _, word in words], np.int64),
        )

    def _decay(self, seqs: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`next_top_p`'s arguments: first, decay, minimum, reset ids; rows without decay keep their value."""
        params = [seq.params for seq in seqs]
        width = max(1, *(len(p.top_p_reset_ids) for p in params))
        resets = np.full((len(params), width), -1, dtype=np.int64)
        for i, p in enumerate(params):
            if p.top_p_decay < 1:
                resets[i, : len(p.top_p_reset_ids)] = p.top_p_reset_ids
        return (
            self._upload([p.top_p for p in params], np.float64),
            self._upload([p.top_p_decay for p in params], np.float64),
            self._upload([p.top_p_min if p.top_p_decay < 1 else 0.0 for p in params], np.float64),
            self._upload(resets),
        )

"""The draws of a step: each sequence's sampling parameters as tensors, sent when they change.

Shape suffixes: N draws of a step, V vocabulary, R, L as in `rows.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import torch

from tpserve.engine.rows import BatchState, Uploader
from tpserve.engine.sequence import Sequence
from tpserve.model.logits import BadWords, Penalties, SamplingBatch, SparseBias
from tpserve.model.sampling import next_top_p

_FLOAT32_MAX = float(np.finfo(np.float32).max)


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
    largest_top_k: int
    penalties: Penalties | None
    bias: SparseBias | None
    bad_words: BadWords | None
    decay: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None
    min_tokens: bool  # some row may not end yet: the bias depends on the position
    reads_history: bool
    is_greedy: bool  # the most probable token of each row, as the network sees it
    num_top_logprobs: int | None  # the most that somebody asks for; None: nobody wants any
    beams: list[int]  # draws that belong to a beam search


@dataclasses.dataclass(frozen=True)
class Draws:
    """The draws of one step, ready for the device.

    Attributes:
        seqs: who draws, one a draw.
        positions: where the token drawn will stand.
        static: what is the same from step to step.
        upload: to the device.
    """

    seqs: list[Sequence]
    positions: list[int]
    static: _Static
    upload: Uploader

    @functools.cached_property
    def device_positions(self) -> torch.Tensor:
        """`positions` on the device, int64 [N]: sent when they are first asked for."""
        return self.upload(self.positions, np.int64)

    def batch(self, state: BatchState, allowed_NW: torch.Tensor | None) -> SamplingBatch:
        """The sampler's view of the rows; runs on the device."""
        s = self.static
        return SamplingBatch(
            temperature_N=s.temperature_N,
            top_k_N=s.top_k_N,
            top_p_N=s.top_p_N if s.decay is None else self._decayed_top_p(state, s.decay[1]),
            min_p_N=s.min_p_N,
            seed_N=s.seed_N,
            position_N=self.device_positions,
            any_random=s.any_random,
            any_filter=s.any_filter,
            any_min_p=s.any_min_p,
            history_NL=state.tokens_RL[s.rows_N, : max(self.positions)] if s.reads_history else None,
            penalties=s.penalties,
            bias=s.bias,
            bad_words=s.bad_words,
            allowed_NW=allowed_NW,
            max_top_k=s.max_top_k,
            largest_top_k=s.largest_top_k,
        )

    def _decayed_top_p(self, state: BatchState, decay_N: torch.Tensor) -> torch.Tensor:
        # Only rows that decay have a state of their own.
        return torch.where(decay_N < 1, state.top_p_R[self.static.rows_N], self.static.top_p_N)

    def decay(self, state: BatchState, tokens_N: torch.Tensor) -> None:
        """What the tokens drawn make of the rows' top_p; runs on the device."""
        s = self.static
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

    def build(self, seqs: list[Sequence], positions: list[int], *, send: bool = True) -> Draws:
        """Args:
        seqs: who draws.
        positions: where the tokens will stand.
        send: to the device at once; otherwise when they are asked for.
        """
        rows = [seq.row for seq in seqs]
        if self._static is None or self._static.min_tokens or rows != self._rows or seqs != self._seqs:
            self._static, self._seqs, self._rows = self._make_static(seqs, positions), seqs, rows
        draws = Draws(seqs, positions, self._static, self._upload)
        if send:
            _ = draws.device_positions
        return draws

    def _make_static(self, seqs: list[Sequence], positions: list[int]) -> _Static:
        upload, params = self._upload, [seq.params for seq in seqs]
        random = [p for p in params if p.temperature > 0]
        top_ks = [p.top_k for p in random if 0 < p.top_k < self._vocab_size]
        filtered = [p for p in random if p.top_k or p.top_p < 1 or p.top_p_decay < 1]
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
        bias = self._bias(seqs, too_short)
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
            largest_top_k=max(top_ks, default=0),
            penalties=penalties,
            bias=bias,
            bad_words=bad_words,
            decay=self._decay(seqs) if any(p.top_p_decay < 1 for p in random) else None,
            min_tokens=any(too_short),
            reads_history=penalties is not None or bad_words is not None,
            is_greedy=not random and penalties is None and bias is None and bad_words is None,
            num_top_logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
            beams=[i for i, seq in enumerate(seqs) if seq.group is not None],
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

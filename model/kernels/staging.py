"""A step's description into the buffers that a graph reads, padding included, in one launch.

Shape suffixes: S rows of a decode step, T tokens, P parts (sequences), N rows whose logits are asked for.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl


@dataclasses.dataclass(frozen=True)
class Staged:
    """What the graph reads; int64.

    Attributes:
        rows_T, positions_T: of the tokens; a position of -1 is padding.
        decodes_T: the positions of those in front that decode, -1 of the others.
        rows_P, starts_P1, contexts_P: of the parts: table row, first token, tokens before it; one more start: the end.
        logits_rows_N: 0 where nothing is asked for.
    """

    rows_T: torch.Tensor
    positions_T: torch.Tensor
    decodes_T: torch.Tensor
    rows_P: torch.Tensor
    starts_P1: torch.Tensor
    contexts_P: torch.Tensor
    logits_rows_N: torch.Tensor

    @classmethod
    def empty(cls, tokens: int, parts: int, logits: int, device: torch.device) -> Staged:
        """Nothing but padding."""

        def zeros(n: int) -> torch.Tensor:
            return torch.zeros(n, dtype=torch.int64, device=device)

        return cls(
            zeros(tokens), zeros(tokens).fill_(-1), zeros(tokens).fill_(-1), zeros(parts), zeros(parts + 1),
            zeros(parts), zeros(logits),
        )  # fmt: skip

    def stage(
        self,
        bucket: int,
        rows_T: torch.Tensor,
        positions_T: torch.Tensor,
        num_decodes: int,
        chunks_3P: torch.Tensor,
        logits_rows_N: torch.Tensor | None,
        *,
        decodes_are_parts: bool,
    ) -> None:
        """Fills the buffers for a step of up to `bucket` tokens.

        Args:
            bucket: tokens to fill, padding included.
            rows_T, positions_T, num_decodes, chunks_3P, logits_rows_N: as `StepInputs` has them, contiguous.
            decodes_are_parts: whether a sequence that decodes is a part of one token.
        """
        t, p = len(rows_T), chunks_3P.shape[1] - 1
        n = t if logits_rows_N is None else len(logits_rows_N)
        parts, logits = len(self.rows_P), len(self.logits_rows_N)
        _stage_kernel[(triton.cdiv(bucket, 256),)](
            rows_T, positions_T, chunks_3P, rows_T if logits_rows_N is None else logits_rows_N,
            self.rows_T, self.positions_T, self.decodes_T, self.rows_P, self.starts_P1, self.contexts_P,
            self.logits_rows_N, t, num_decodes, num_decodes if decodes_are_parts else 0, p, n,
            int(logits_rows_N is None), bucket,
            PARTS=parts, PP=triton.next_power_of_2(parts + 1), LOGITS=logits, NN=triton.next_power_of_2(logits), C=256,
        )  # fmt: skip


def stage_decodes(
    bucket: int, rows_N: torch.Tensor, positions_N: torch.Tensor, rows_S: torch.Tensor, positions_S: torch.Tensor
) -> None:
    """The same for a decode step: fills the first `bucket` of `rows_S` and `positions_S`."""
    _stage_decodes_kernel[(triton.cdiv(bucket, 256),)](
        rows_N, positions_N, rows_S, positions_S, len(rows_N), bucket, C=256
    )


# Alignment and values change from step to step: they must not make another variant.
_VARYING = ["rows_ptr", "positions_ptr", "chunks_ptr", "logits_ptr", "t", "s", "ones", "p", "n", "all_rows", "bucket"]


@triton.jit(do_not_specialize=_VARYING)
def _stage_kernel(
    rows_ptr, positions_ptr, chunks_ptr, logits_ptr,
    rows_out, positions_out, decodes_out, rows_p_out, starts_out, contexts_out, logits_out,
    t, s, ones, p, n, all_rows, bucket,
    PARTS: tl.constexpr, PP: tl.constexpr, LOGITS: tl.constexpr, NN: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * C + tl.arange(0, C)
    there, room = at < t, at < bucket
    position = tl.load(positions_ptr + at, mask=there, other=-1)
    tl.store(rows_out + at, tl.load(rows_ptr + at, mask=there, other=0), mask=room)
    tl.store(positions_out + at, position, mask=room)
    tl.store(decodes_out + at, tl.where(at < s, position, -1), mask=room)
    if tl.program_id(0) == 0:
        i = tl.arange(0, PP)
        one, chunk, inside = i < ones, (i >= ones) & (i < ones + p), i < PARTS
        row = tl.load(rows_ptr + i, mask=one, other=0) + tl.load(chunks_ptr + i - ones, mask=chunk, other=0)
        start = tl.load(chunks_ptr + (p + 1) + i - ones, mask=chunk, other=0)
        context = tl.load(positions_ptr + i, mask=one, other=0)
        context += tl.load(chunks_ptr + 2 * (p + 1) + i - ones, mask=chunk, other=0)
        tl.store(rows_p_out + i, row, mask=inside)
        tl.store(starts_out + i, tl.where(one, i, tl.where(chunk, start, t)), mask=i <= PARTS)
        tl.store(contexts_out + i, context, mask=inside)
        i = tl.arange(0, NN)
        asked = tl.load(logits_ptr + i, mask=i < n, other=0)
        tl.store(logits_out + i, tl.where((all_rows != 0) & (i < n), i, asked), mask=i < LOGITS)


@triton.jit(do_not_specialize=["rows_ptr", "positions_ptr", "n", "bucket"])
def _stage_decodes_kernel(rows_ptr, positions_ptr, rows_out, positions_out, n, bucket, C: tl.constexpr):
    at = tl.program_id(0) * C + tl.arange(0, C)
    there, room = at < n, at < bucket
    tl.store(rows_out + at, tl.load(rows_ptr + at, mask=there, other=0), mask=room)
    tl.store(positions_out + at, tl.load(positions_ptr + at, mask=there, other=-1), mask=room)

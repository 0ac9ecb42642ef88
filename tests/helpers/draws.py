"""Rows of a batch with sampling controls, as the engine hands them to the sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from tpserve.model.sampling import SamplingBatch


@dataclasses.dataclass(frozen=True)
class Row:
    """One row's controls, in the units of a request; top_k 0: all."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 7


def make_batch(
    rows: Sequence[Row], vocab_size: int = 150, bounded: bool = False, device: torch.device | str = "cpu"
) -> SamplingBatch:
    """The batch as the engine builds it; with max_top_k if `bounded` and the rows allow it."""
    chosen = [r for r in rows if r.temperature > 0]
    filtered = [r for r in chosen if r.top_k or r.top_p < 1]
    max_top_k = max((r.top_k for r in filtered), default=0) if all(r.top_k for r in filtered) else 0
    return SamplingBatch(
        temperature_N=torch.tensor([r.temperature for r in rows], dtype=torch.float32, device=device),
        top_k_N=torch.tensor([r.top_k or vocab_size for r in rows], device=device),
        top_p_N=torch.tensor([r.top_p for r in rows], dtype=torch.float64, device=device),
        min_p_N=torch.tensor([r.min_p for r in rows], dtype=torch.float32, device=device),
        seed_N=torch.tensor([r.seed - 2**64 if r.seed >= 2**63 else r.seed for r in rows], device=device),
        position_N=torch.tensor([r.position for r in rows], device=device),
        any_random=bool(chosen),
        any_filter=bool(filtered),
        any_min_p=any(r.min_p > 0 for r in chosen),
        max_top_k=max_top_k if bounded and max_top_k else None,
        largest_top_k=max((r.top_k for r in chosen if r.top_k < vocab_size), default=0),
    )


def logits_of(seed: int, shape: tuple[int, ...], ties: bool = False) -> torch.Tensor:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
    return (logits * 2).round() / 2 if ties else logits

"""One step on the device: a plan goes in, sampled tokens come out. The only file of the step loop that knows torch."""

from __future__ import annotations

import dataclasses

import torch

from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.scheduler import ScheduledSequence
from tpserve.model.attention import PagedAttention, SequenceSlice
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.loader import LoadedModel
from tpserve.model.sampling import SamplingBatch, sample, token_logprobs


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step sampled.

    Attributes:
        tokens: one for each entry of the plan that samples.
        logprobs: likewise, natural logarithms; None for requests that did not ask.
    """

    tokens: list[int]
    logprobs: list[float | None]


class ModelRunner:
    """Runs plans on this rank.

    Args:
        loaded: the network.
        cache: its KV cache.
    """

    def __init__(self, loaded: LoadedModel, cache: PagedKVCache) -> None:
        self._loaded, self._cache = loaded, cache

    @torch.inference_mode()
    def run(self, plan: list[ScheduledSequence]) -> StepResult:
        """Computes the plan's tokens and samples where a sequence is complete."""
        device = self._loaded.device
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for entry in plan:
            start, stop = entry.seq.num_computed_tokens, entry.seq.num_computed_tokens + entry.num_query_tokens
            tokens += entry.seq.token_ids[start:stop]
            positions += range(start, stop)
            if entry.samples:
                rows.append(len(tokens) - 1)
        attend = PagedAttention(
            self._cache,
            [SequenceSlice(e.seq.num_computed_tokens, e.num_query_tokens, e.seq.block_table) for e in plan],
        )
        logits_NV = self._loaded.model(
            torch.tensor(tokens, device=device),
            torch.tensor(positions, device=device),
            attend,
            torch.tensor(rows, dtype=torch.int64, device=device),
        )
        sampling = [entry for entry in plan if entry.samples]
        if not sampling:
            return StepResult([], [])
        params = [entry.seq.params for entry in sampling]
        batch = _sampling_batch(params, [e.seq.num_tokens for e in sampling], logits_NV.shape[1], device)
        tokens_N = sample(logits_NV, batch)
        logprobs: list[float | None] = [None] * len(params)
        if any(p.logprobs for p in params):
            values = token_logprobs(logits_NV, tokens_N).tolist()
            logprobs = [v if p.logprobs else None for v, p in zip(values, params, strict=True)]
        return StepResult(tokens_N.tolist(), logprobs)


def _sampling_batch(
    params: list[SamplingParams], positions: list[int], vocab_size: int, device: torch.device
) -> SamplingBatch:
    random = [p for p in params if p.temperature > 0]
    return SamplingBatch(
        temperature_N=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
        top_k_N=torch.tensor([p.top_k or vocab_size for p in params], device=device),
        top_p_N=torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
        seed_N=torch.tensor([_signed(p.seed or 0) for p in params], dtype=torch.int64, device=device),
        position_N=torch.tensor(positions, dtype=torch.int64, device=device),
        any_random=bool(random),
        any_filter=any(p.top_k or p.top_p < 1 for p in random),
    )


def _signed(seed: int) -> int:
    """The int64 with the same 64 bits."""
    return seed - 2**64 if seed >= 2**63 else seed

"""Log-probabilities of prompts: which rows of a step's logits they need, and what is made of those."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import torch

from tpserve.engine.protocol import PromptLogprob, TopLogprobs
from tpserve.engine.rows import Uploader
from tpserve.engine.step import StepPlan
from tpserve.model.logits import token_logprobs, top_logprobs


@dataclasses.dataclass(frozen=True)
class PromptRows:
    """Logits of prompt tokens whose log-probabilities are asked for; P of them.

    Attributes:
        spans: (entry, number of rows).
        rows: tokens of the step whose logits these are.
        targets_P: int64, the tokens that follow.
        top: how many of the most probable tokens are wanted beside them.
    """

    spans: list[tuple[int, int]]
    rows: list[int]
    targets_P: torch.Tensor
    top: int

    @classmethod
    def of(cls, plan: StepPlan, upload: Uploader) -> PromptRows | None:
        """Those of a plan; None: nobody asks."""
        spans: list[tuple[int, int]] = []
        rows: list[int] = []
        targets: list[int] = []
        top = first = 0
        for i, entry in enumerate(plan.entries):
            seq = entry.seq
            if seq.params.prompt_logprobs is not None and not seq.said:
                n = min(entry.start + entry.num_query_tokens, seq.num_prompt_tokens - 1) - entry.start
                if n > 0:
                    spans.append((i, n))
                    rows += range(first, first + n)
                    targets += seq.token_ids[entry.start + 1 : entry.start + 1 + n]
                    top = max(top, seq.params.prompt_logprobs)
            first += entry.num_query_tokens
        return cls(spans, rows, upload(targets, np.int64), top) if spans else None

    def compute(self, logits_PV: torch.Tensor, out: dict[str, torch.Tensor]) -> None:
        """Puts their log-probabilities into `out`; runs on the device."""
        out["prompt"] = token_logprobs(logits_PV, self.targets_P)
        if self.top:
            out["prompt_top"], out["prompt_ids"] = top_logprobs(logits_PV, min(self.top, logits_PV.shape[1]))

    def read(self, host: dict[str, list[Any]]) -> dict[int, list[PromptLogprob]]:
        """What `compute` found, by entry, once it is on the host."""
        none: TopLogprobs = []
        tops = pairs(host["prompt_ids"], host["prompt_top"]) if self.top else itertools.repeat(none)
        values = zip(host["prompt"], tops, strict=False)
        return {entry: [PromptLogprob(*v) for v in itertools.islice(values, n)] for entry, n in self.spans}


def pairs(ids: list[list[int]], values: list[list[float]]) -> list[TopLogprobs]:
    """(token, log-probability) of each row."""
    return [list(zip(a, b, strict=True)) for a, b in zip(ids, values, strict=True)]

"""Beam search over sequences: which hypotheses live on, and when nothing better can come.

A beam is a `Sequence`. Each step every living beam offers its most probable ways to go on; when all have, the best
`beam_width` of all offers are the next beams. They share their past's KV blocks, copied only where they are written.
A hypothesis that ends (stop token, length, the grammar's end) is kept among the `beam_width` best finished ones, by
score: log-probability / length ** len_penalty, the length counted in generated tokens with the one that stopped it
(Wu et al., "Google's Neural Machine Translation System", 2016, in the simpler form that Hugging Face and
FasterTransformer use).
"""

from __future__ import annotations

import dataclasses
import math

from tpserve.engine.protocol import PromptLogprob
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.sequence import Sequence
from tpserve.engine.step import Candidate


@dataclasses.dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished answer: its tokens (without the one that stopped it), their raw log-probabilities, and its worth."""

    token_ids: list[int]
    logprobs: list[float]
    cumulative_logprob: float
    score: float
    finish_reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Extension:
    """A beam of the next step: `parent` and one more token."""

    parent: Sequence
    candidate: Candidate
    cumulative_logprob: float


class BeamGroup:
    """One request's beam search.

    Args:
        params: the request's.

    Attributes:
        beams: the living ones and their log-probabilities, best first.
        admitted: it holds `width` batch rows.
        spare_rows: those of them that no beam uses.
        finished: the best hypotheses that have ended, best first.
        prompt_logprobs: see `Sequence`; of the first beam, which alone has computed the prompt.
    """

    def __init__(self, params: SamplingParams, root: Sequence) -> None:
        self.width = params.beam_width
        self.beams: dict[Sequence, float] = {root: 0.0}
        self.logprobs: dict[Sequence, list[float]] = {root: []}
        self.admitted = False
        self.spare_rows: list[int] = []
        self.finished: list[Hypothesis] = []
        self.prompt_logprobs: list[PromptLogprob | None] | None = None
        self.next_index = 1
        self._params = params
        self._offers: dict[Sequence, list[Candidate]] = {}

    @property
    def num_candidates(self) -> int:
        """Offers that each beam must make so that `width` of them go on even if all stop tokens are among them."""
        return self.width + max(self.width, len(next(iter(self.beams)).stop_token_ids))

    def offer(self, beam: Sequence, candidates: list[Candidate]) -> bool:
        """Takes a beam's offers; returns whether all living beams have made theirs."""
        self._offers[beam] = candidates
        return len(self._offers) == len(self.beams)

    def withdraw(self, beam: Sequence) -> None:
        """Forgets a beam's offers: it was preempted, and will compute them again."""
        self._offers.pop(beam, None)

    def select(self) -> list[Extension]:
        """Chooses the next beams among the offers, and keeps what ended; empty: the search is over."""
        if self.prompt_logprobs is None:
            (root,) = self.beams
            self.prompt_logprobs = root.prompt_logprobs.copy()
        offers = [
            Extension(beam, candidate, self.beams[beam] + candidate.logprob)
            for beam in self.beams
            for candidate in self._offers[beam]
            if candidate.logprob > -math.inf
        ]
        offers.sort(key=lambda e: -e.cumulative_logprob)  # stable: ties go to the better beam, the lower token
        self._offers = {}
        going_on: list[Extension] = []
        for extension in offers:
            if len(going_on) == self.width:
                break
            reason = self._reason(extension)
            if reason is None:
                going_on.append(extension)
            else:
                self._finish(extension, reason)
        if not going_on or self._is_over(going_on):
            return []
        return going_on

    def _reason(self, extension: Extension) -> str | None:
        beam, token_id = extension.parent, extension.candidate.token_id
        reason = beam.finish_reason_after(token_id)
        if reason != "stop" and beam.matcher is not None:
            twin = beam.matcher.fork()
            twin.advance(token_id)
            if twin.finished:
                return "stop"
        return reason

    def _finish(self, extension: Extension, reason: str) -> None:
        beam, candidate = extension.parent, extension.candidate
        ids, logprobs = beam.token_ids[beam.num_prompt_tokens :], self.logprobs[beam]
        score = self._score(extension.cumulative_logprob, len(ids) + 1)
        if candidate.token_id not in beam.stop_token_ids:
            ids, logprobs = [*ids, candidate.token_id], [*logprobs, candidate.raw_logprob]
        self.finished.append(Hypothesis(ids, logprobs, extension.cumulative_logprob, score, reason))
        self.finished.sort(key=lambda h: -h.score)
        del self.finished[self.width :]

    def _score(self, cumulative_logprob: float, length: int) -> float:
        return cumulative_logprob / math.pow(length, self._params.len_penalty)

    def _is_over(self, going_on: list[Extension]) -> bool:
        if len(self.finished) < self.width:
            return False
        if self._params.early_stopping:
            return True
        # A log-probability only falls. With a positive penalty a hypothesis is worth most at its greatest length, with
        # a negative one at its smallest.
        beam = going_on[0].parent
        shortest = beam.num_output_tokens + 2
        longest = max(beam.max_tokens - beam.num_prompt_tokens, shortest)
        best = max(self._score(going_on[0].cumulative_logprob, length) for length in (shortest, longest))
        return best <= self.finished[-1].score

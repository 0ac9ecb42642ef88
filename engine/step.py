"""What one step is asked to do, and what it found: between the scheduler, which knows no tensors, and the runner."""

from __future__ import annotations

import dataclasses

from tpserve.engine.protocol import PromptLogprob, TopLogprobs
from tpserve.engine.sequence import Sequence


@dataclasses.dataclass(slots=True)
class ScheduledSequence:
    """A sequence's part in a step.

    Attributes:
        seq: the sequence.
        start: position of the first token to compute.
        num_query_tokens: tokens to compute, drafts included.
        samples: who draws a token after the last of them: nobody, the sequence, or it and its children.
        drafts: guesses for the tokens after the last known one; with k of them, k + 1 tokens are drawn.
        num_steps: tokens that are drawn one after another, each computed from the one before, without the host in
            between; above 1 only for a sequence that decodes alone, without drafts.
    """

    seq: Sequence
    start: int
    num_query_tokens: int
    samples: tuple[Sequence, ...]
    drafts: list[int]
    num_steps: int = 1

    @property
    def num_draws(self) -> int:
        """Tokens that are drawn for each of `samples`."""
        return len(self.drafts) + self.num_steps


@dataclasses.dataclass(slots=True)
class StepPlan:
    """A step. The runner does, in this order: loads, new_blocks, writes, copies, the network, the draws.

    Attributes:
        entries: parts; those with one query token and one draw come first.
        loads: sequences whose rows must be written: tokens, block table, parameters.
        new_blocks: (sequence, place in its table, block): changes of tables that are loaded already.
        writes: (sequence, position, token): tokens that the host decided.
        copies: (from, to): blocks to be copied; all are read before any is written.
        scheduled: requests that run for the first time.
        num_prompt_logits: prompt tokens whose log-probabilities are asked for.
    """

    entries: list[ScheduledSequence] = dataclasses.field(default_factory=list)
    loads: list[Sequence] = dataclasses.field(default_factory=list)
    new_blocks: list[tuple[Sequence, int, int]] = dataclasses.field(default_factory=list)
    writes: list[tuple[Sequence, int, int]] = dataclasses.field(default_factory=list)
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    scheduled: list[str] = dataclasses.field(default_factory=list)
    num_prompt_logits: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the network."""
        return sum(entry.num_query_tokens for entry in self.entries)

    @property
    def guided(self) -> bool:
        """Whether a grammar has a say in what is drawn."""
        return any(seq.matcher is not None for entry in self.entries for seq in entry.samples)


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A way for a beam to go on: log-probability by which it is chosen, and that under the unmodified distribution."""

    token_id: int
    logprob: float
    raw_logprob: float


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What a step drew.

    Attributes:
        tokens: one a draw: for each entry's samples, in order, `num_draws`.
        logprobs: likewise, natural logarithms; None when nobody asked.
        top_logprobs: likewise, the most probable tokens; None when nobody asked.
        candidates: by draw, for beams: the best ways to go on.
        prompt_logprobs: by entry, for its query tokens: of the token that follows each.
    """

    tokens: list[int]
    logprobs: list[float] | None = None
    top_logprobs: list[TopLogprobs] | None = None
    candidates: dict[int, list[Candidate]] = dataclasses.field(default_factory=dict)
    prompt_logprobs: dict[int, list[PromptLogprob]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class Progress:
    """What a step meant for a sequence.

    Attributes:
        seq: the sequence; for a finished beam search any of its beams.
        token_ids: new tokens of its output; a token that only stopped it is left out.
        first_draw: draw of the first of them; the others follow.
        finish_reason: why it ended, or None.
        error: what happened, with finish_reason "error".
    """

    seq: Sequence
    token_ids: list[int]
    first_draw: int
    finish_reason: str | None
    error: str | None = None

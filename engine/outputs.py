"""What users get to hear of a step."""

from __future__ import annotations

from tpserve.engine.protocol import PromptLogprob, RequestOutput
from tpserve.engine.sequence import Sequence
from tpserve.engine.step import Progress, StepResult


def output(done: Progress, result: StepResult) -> RequestOutput:
    """The new tokens of one sequence."""
    seq, first, n = done.seq, done.first_draw, len(done.token_ids)
    said, seq.said = seq.said, True
    asked = seq.params.logprobs
    if said and asked is None:
        return RequestOutput(seq.request_id, done.token_ids, None, done.finish_reason, done.error, seq.index)
    logprobs = tops = prompt = None
    if asked is not None:
        assert result.logprobs is not None
        logprobs = result.logprobs[first : first + n]
        if asked:
            assert result.top_logprobs is not None
            tops = [top[:asked] for top in result.top_logprobs[first : first + n]]
    if not said and seq.index == 0 and seq.params.prompt_logprobs is not None:
        prompt = _prompt_logprobs(seq.prompt_logprobs, seq.params.prompt_logprobs)
    return RequestOutput(
        seq.request_id,
        done.token_ids,
        logprobs,
        done.finish_reason,
        done.error,
        index=seq.index,
        top_logprobs=tops,
        prompt_logprobs=prompt,
        num_cached_tokens=0 if said else seq.num_cached_tokens,
    )


def beam_outputs(seq: Sequence) -> list[RequestOutput]:
    """The best hypotheses of a finished beam search, best first."""
    group, params = seq.group, seq.params
    assert group is not None
    asked = params.prompt_logprobs
    return [
        RequestOutput(
            seq.request_id,
            hypothesis.token_ids,
            hypothesis.logprobs if params.logprobs is not None else None,
            hypothesis.finish_reason,
            index=i,
            prompt_logprobs=None if i or asked is None else _prompt_logprobs(group.prompt_logprobs or [], asked),
            num_cached_tokens=seq.num_cached_tokens,
            cumulative_logprob=hypothesis.cumulative_logprob,
        )
        for i, hypothesis in enumerate(group.finished[: params.n])
    ]


def _prompt_logprobs(computed: list[PromptLogprob | None], asked: int) -> list[PromptLogprob | None]:
    """One a prompt token; nothing stands before the first."""
    return [None, *(PromptLogprob(p.logprob, p.top[:asked]) for p in computed if p is not None)]

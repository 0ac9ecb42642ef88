"""Beam search once more, from the textbook: every step from the beginning, on the plain network."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from tests.helpers.plain import PlainLlama, log_softmax
from tests.helpers.plain_sampling import process, stops
from tpserve.engine.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class Answer:
    """A hypothesis of a beam search; the token that stopped it is left out."""

    token_ids: list[int]
    logprob: float
    score: float
    finish_reason: str


def beam_search(
    model: PlainLlama, params: SamplingParams, prompt: list[int], eos_id: int
) -> tuple[list[Answer], float]:
    """The textbook's beam search, every step from the beginning.

    Of all ways to go on from all living beams, best first, those that end join the `beam_width` best answers by score,
    until `beam_width` have been found that do not end: the next beams.

    Returns:
        (the answers, best first; the margin: how near the nearest choice between two of them was).
    """
    width, end = params.beam_width, stops(params, eos_id)
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    answers: list[Answer] = []
    margin = math.inf

    def score(logprob: float, length: int) -> float:
        return float(logprob / length**params.len_penalty)

    while True:
        totals = np.stack([
            logprob + log_softmax(process(model.logits(prompt + ids)[-1], params, prompt, ids, eos_id))
            for ids, logprob in beams
        ])  # fmt: skip
        going_on: list[tuple[list[int], float]] = []
        last = math.inf
        for place in np.argsort(-totals, axis=None, kind="stable"):
            beam, token = divmod(int(place), totals.shape[1])
            ids, total = beams[beam][0], float(totals[beam, token])
            if len(going_on) == width or total == -math.inf:
                margin = min(margin, last - total)
                break
            last, length = total, len(ids) + 1
            if token in end:
                answers.append(Answer(ids, total, score(total, length), "stop"))
            elif length == params.max_new_tokens:
                answers.append(Answer([*ids, token], total, score(total, length), "length"))
            else:
                going_on.append(([*ids, token], total))
        answers.sort(key=lambda answer: -answer.score)
        del answers[width:]
        if going_on and len(answers) == width:
            lengths = range(len(going_on[0][0]) + 1, params.max_new_tokens + 1)
            hope = max(score(going_on[0][1], length) for length in lengths)
            if params.early_stopping or hope <= answers[-1].score:
                going_on = []
        if not going_on:
            scores = [answer.score for answer in answers[: params.n + 1]]
            return answers[: params.n], min([margin, *(a - b for a, b in itertools.pairwise(scores))])
        beams = going_on

"""Sampling once more, from its definition, on the plain network: numpy float64.

Nothing here is shared with the engine. An engine's answer is checked token by token after its own past (`check`): the
network is causal, so that one pass over the whole answer gives the logits of every position, and by induction the
answer is what a loop of these decisions would have generated. Each decision has a margin: how much a logit would have
to change to change it. The engine computes in float32: where the margin is of the size of its rounding it may differ.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np

from tests.helpers.plain import Floats, PlainLlama
from tpserve.engine.sampling_params import SamplingParams


def philox(key: int, counter: int) -> int:
    """Philox4x32-10 (Salmon et al., 2011): 64 bits of key, 128 of counter in and out, low words first."""
    word = (1 << 32) - 1
    c = [counter >> shift & word for shift in (0, 32, 64, 96)]
    for i in range(10):
        left, right = c[2] * 0xCD9E8D57, c[0] * 0xD2511F53
        key_0, key_1 = (key + i * 0x9E3779B9) & word, ((key >> 32) + i * 0xBB67AE85) & word
        c = [left >> 32 ^ c[1] ^ key_0, left & word, right >> 32 ^ c[3] ^ key_1, right & word]
    return c[0] | c[1] << 32 | c[2] << 64 | c[3] << 96


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) of a position: 27 bits of the first word, then 26 of the second."""
    bits = philox(seed, position)
    return (((bits & 0xFFFFFFFF) >> 5) * 2**26 + ((bits >> 32 & 0xFFFFFFFF) >> 6)) / 2**53


def seed_of(seed: int, index: int) -> int:
    """The seed of a request's answer."""
    return philox(seed, 1 << 96 | index) & (2**64 - 1) if index else seed


@dataclasses.dataclass(frozen=True)
class Decision:
    """A token, and how far all that led to it was from turning out otherwise, in units of a logit."""

    token_id: int
    margin: float


def process(logits: Floats, params: SamplingParams, prompt: list[int], output: list[int], eos_id: int) -> Floats:
    """Penalties, bias and bans, as `SamplingParams` describes them; [V]."""
    x = logits.copy()
    for v in {*prompt, *output}:
        x[v] = x[v] / params.repetition_penalty if x[v] > 0 else x[v] * params.repetition_penalty
    for v, count in Counter(output).items():
        x[v] -= params.presence_penalty + params.frequency_penalty * count
    for v, bias in params.logit_bias.items():
        x[v] += bias
    text = prompt + output
    for word in params.bad_words:
        prefix = list(word[:-1])
        if len(prefix) <= len(text) and text[len(text) - len(prefix) :] == prefix:
            x[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        x[sorted(stops(params, eos_id))] = -np.inf
    return x


def stops(params: SamplingParams, eos_id: int) -> set[int]:
    """Tokens that end an answer."""
    return {*params.stop_token_ids} | (set() if params.ignore_eos else {eos_id})


def top_p_after(params: SamplingParams, output: list[int]) -> float:
    """What decay and resets have made of top_p."""
    top_p = params.top_p
    for token in output:
        top_p = params.top_p if token in params.top_p_reset_ids else max(params.top_p_min, top_p * params.top_p_decay)
    return top_p if params.top_p_decay < 1 else params.top_p


def decide(
    logits: Floats, params: SamplingParams, prompt: list[int], output: list[int], seed: int, eos_id: int
) -> Decision:
    """The token that follows `prompt + output`.

    Args:
        logits: of the network, [V].
        params: the request's.
        prompt, output: the past.
        seed: of this answer.
        eos_id: of the tokenizer.
    """
    x = process(logits, params, prompt, output, eos_id)
    order = np.argsort(-x, kind="stable")  # most probable first, of equals the lower id
    if params.temperature == 0:
        return Decision(int(order[0]), float(x[order[0]] - x[order[1]]))
    margins = [math.inf]
    relative = np.exp((x[order] - x[order[0]]) / params.temperature)
    kept = int((relative >= params.min_p).sum())
    if params.min_p:
        margins += (np.abs(np.log(relative[max(kept - 1, 1) : kept + 1] / params.min_p)) * params.temperature).tolist()
    if params.top_k and params.top_k < kept:
        kept = params.top_k
        margins.append(float(x[order[kept - 1]] - x[order[kept]]))
    top_p = top_p_after(params, output)
    if top_p < 1:
        mass = relative[:kept] / relative[:kept].sum()
        before = np.cumsum(mass) - mass
        margins.append(float(np.abs(before[1:] - top_p).min(initial=math.inf)) * params.temperature)
        fewer = int((before < top_p).sum())
        if fewer < kept:
            kept = fewer
            margins.append(float(x[order[kept - 1]] - x[order[kept]]))
    in_vocabulary_order = np.sort(order[:kept])
    probability = np.exp((x[in_vocabulary_order] - x[order[0]]) / params.temperature)
    edges = np.cumsum(probability) / probability.sum()
    target = uniform(seed, len(prompt) + len(output))
    place = int((edges[:-1] <= target).sum())
    margins.append(float(np.abs(edges[:-1] - target).min(initial=math.inf)) * params.temperature)
    return Decision(int(in_vocabulary_order[place]), min(margins))


@dataclasses.dataclass
class Tally:
    """What `check` has seen.

    Attributes:
        tokens: compared.
        near_ties: of them, those that differed where the margin allowed it.
        smallest: the smallest margin of all decisions.
        logprob_error: the largest difference of a log-probability.
    """

    tokens: int = 0
    near_ties: int = 0
    smallest: float = math.inf
    logprob_error: float = 0.0


def check(
    model: PlainLlama,
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    finish_reason: str | None,
    tally: Tally,
    *,
    eos_id: int,
    max_seq_len: int,
    index: int = 0,
    tolerance: float = 1e-5,
) -> Floats:
    """Asserts that an answer is what the decisions above give.

    Args:
        model: the network.
        params: the request's, with its seed.
        prompt: the request's.
        output: the answer, without the token that stopped it.
        finish_reason: the answer's.
        tally: counts.
        eos_id: of the tokenizer.
        max_seq_len: of the engine.
        index: which answer it is.
        tolerance: a decision may turn out otherwise when its margin is smaller.

    Returns:
        the logits of every token of prompt and output, [T, V].
    """
    logits = model.logits(prompt + output)
    end = stops(params, eos_id)
    longest = min(params.max_new_tokens, max_seq_len - len(prompt))
    assert finish_reason in ("stop", "length")
    assert len(output) == longest if finish_reason == "length" else len(output) < longest
    assert not end & set(output), "a stop token was delivered"
    seed = seed_of(params.seed or 0, index)
    for i in range(len(output) + (finish_reason == "stop")):
        decision = decide(logits[len(prompt) - 1 + i], params, prompt, output[:i], seed, eos_id)
        tally.tokens += 1
        tally.smallest = min(tally.smallest, decision.margin)
        same = decision.token_id == output[i] if i < len(output) else decision.token_id in end
        tally.near_ties += not same
        assert same or decision.margin < tolerance, (params, prompt, output, i, decision)
    return logits

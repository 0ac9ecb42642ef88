"""One row's draw on a CPU: the token that `sampling.sample_batch` draws.

Beside a network that streams its weights through the caches, an operation costs what fetching its code costs. So rows
are drawn one by one, by few operations, and only what may be kept is sorted.

Shape suffixes: V vocabulary, C candidates, K those that are kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from tpserve.model.philox import DRAW, MASK_32, philox4x32

ONE = 2.0**44  # the weight of a row's most probable token


def sample_row(
    logits_V: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> int:
    """The token drawn; arguments as of a row of `SamplingBatch`, which have passed through its types.

    Args:
        logits_V: float32.
    """
    logits = logits_V.numpy()
    most, vocab_size = float(logits.max()), len(logits)
    if temperature == 0 or not most < math.inf:
        return int(logits.argmax())
    most = max(most, torch.finfo(torch.float32).min)  # -inf less -inf would be NaN
    relative_V = (logits_V - most).div_(temperature).exp_()
    if min_p > 0:
        relative_V.masked_fill_(relative_V < min_p, 0.0)
    weights = relative_V.mul_(ONE).long().numpy()
    total = int(weights.sum())
    if not total:  # nothing but -inf
        return 0
    kept = None
    if top_k < vocab_size:
        least = logits_V.topk(top_k).values[-1].item()
        kept = _first(logits, logits > least, least, top_k)
        total = int(weights[kept].sum())
    if top_p < 1:
        limit = max(1, min(math.ceil(top_p * total), total))  # a top_p that has decayed to 0 keeps the first token
        if kept is None:
            # With V tokens, those that have at most the V-th part of the mass that may be left out are left out.
            kept = (weights > (total - limit) // vocab_size).nonzero()[0]
        values_C = logits[kept]
        order_C = values_C.argsort()[::-1]
        last = int(weights[kept][order_C].cumsum().searchsorted(limit))
        least = values_C[order_C[last]]
        kept = kept[_first(values_C, values_C > least, least, last + 1)]
    weights = weights if kept is None else weights[kept]
    running = weights.cumsum()
    total = int(running[-1])
    target = min(int(_uniform(seed, position) * total), total - 1)  # the product may be rounded up
    place = min(int(running.searchsorted(target, side="right")), len(running) - 1)
    return place if kept is None else int(kept[place])


def _first(values: Any, above: Any, least: float, count: int) -> Any:
    """Places of the first `count` in order of value and then of place, ascending.

    Args:
        values: [C].
        above: bool [C], those larger than `least`; overwritten.
        least: the last one's value.
        count: at least as many as are above, at most as many as are not below.
    """
    equal = (values == least).nonzero()[0]
    above[equal[: count - int(above.sum())]] = True
    return above.nonzero()[0]


def _uniform(seed: int, position: int) -> float:
    """`sampling.uniform`."""
    key = (seed & MASK_32, (seed >> 32) & MASK_32)
    word_0, word_1, _, _ = philox4x32((position & MASK_32, (position >> 32) & MASK_32, 0, DRAW), key)
    return (((word_0 >> 5) << 26) | (word_1 >> 6)) * 2.0**-53

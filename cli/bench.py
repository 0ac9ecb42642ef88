"""`tpserve bench`: latency, throughput, serve; the functions are the bench room's own."""

from __future__ import annotations

import re
from collections.abc import Callable

import fire

_TEXTS = ("model", "dtype", "device", "against", "out")
_SERVE_TEXTS = ("url", "start", "against", "trace", "goodput", "tokenizer", "endpoint", "model", "api_key", "out",
                "plot")  # fmt: skip


def commands(chosen: list[str]) -> dict[str, Callable[..., None]]:
    """What stands behind `tpserve bench`, for fire.

    Args:
        chosen: the word after it, where there is one: the load generator of `serve` does not wait for torch.
    """
    from tpserve.bench.serve import main

    found: dict[str, Callable[..., None]] = {
        "serve": fire.decorators.SetParseFns(**dict.fromkeys(_SERVE_TEXTS, str))(main)
    }
    if chosen != ["serve"]:
        from tpserve.bench.offline import latency, throughput

        texts_stay_texts = fire.decorators.SetParseFns(**dict.fromkeys(_TEXTS, str))
        found = {"latency": texts_stay_texts(latency), "throughput": texts_stay_texts(throughput), **found}
    return found


def with_joined_objectives(arguments: list[str]) -> list[str]:
    """`--goodput ttft:500 itl:50` as one value: fire would take the second for an argument of its own."""
    joined: list[str] = []
    for argument in arguments:
        after_goodput = bool(joined) and (joined[-1].startswith("--goodput=") or joined[-2:-1] == ["--goodput"])
        if after_goodput and re.fullmatch(r"[a-z0-9]+:[0-9.]+", argument):
            joined[-1] += f",{argument}"
        else:
            joined.append(argument)
    return joined

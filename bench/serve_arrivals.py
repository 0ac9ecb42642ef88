"""When requests come, how long they are, and what they say. Free of torch."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tpserve.engine.text.tokenizer import PieceKind, Tokenizer

_LEAST_WORDS = 8


@dataclasses.dataclass(frozen=True)
class Arrival:
    """One request: seconds after the beginning, and lengths in tokens."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int


def read_trace(
    path: Path, num_requests: int, shrink_prompts: float, shrink_outputs: float, max_seq_len: int
) -> list[Arrival]:
    """The first lines of a trace, with lengths divided: at least 1 token, together at most the context.

    Args:
        path: CSV in the format of the Azure LLM inference traces 2023
            (https://github.com/Azure/AzurePublicDataset): TIMESTAMP, ContextTokens, GeneratedTokens.
        num_requests: so many lines.
        shrink_prompts, shrink_outputs: lengths are divided by them.
        max_seq_len: of the model served.

    Raises:
        ValueError: it has fewer requests.
    """
    arrivals: list[Arrival] = []
    start: datetime.datetime | None = None
    with path.open(newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            at = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26])  # the seventh digit is below a microsecond
            start = at if start is None else start
            num_output_tokens = max(1, min(round(int(row["GeneratedTokens"]) / shrink_outputs), max_seq_len - 1))
            num_prompt_tokens = max(1, round(int(row["ContextTokens"]) / shrink_prompts))
            num_prompt_tokens = min(num_prompt_tokens, max_seq_len - num_output_tokens)
            arrivals.append(Arrival((at - start).total_seconds(), num_prompt_tokens, num_output_tokens))
            if len(arrivals) == num_requests:
                return arrivals
    raise ValueError(f"{path} has {len(arrivals)} requests, {num_requests} are asked")


def at_rate(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """The same pattern, squeezed or stretched to `rate` requests a second; infinite: all at once."""
    last_s = max(arrivals[-1].at_s, 1e-9)
    factor = len(arrivals) / rate / last_s
    return [dataclasses.replace(arrival, at_s=arrival.at_s * factor) for arrival in arrivals]


def poisson(rate: float, input_len: int, output_len: int, n: int, spread: float, seed: int) -> list[Arrival]:
    """`n` arrivals of a Poisson process, scaled so that the last comes after `n / rate` seconds.

    A Poisson process in which the time of an arrival is given has the others at independent uniform times before it: so
    the rate is the one that was asked, and the gaps are as irregular as they should be.

    Args:
        rate: requests a second; infinite: all at once.
        input_len, output_len: tokens.
        n: requests.
        spread: lengths are uniform within this share of theirs, up and down.
        seed: the same seed gives the same arrivals and lengths.
    """
    rng = np.random.default_rng(seed)
    at_s = np.cumsum(rng.exponential(1.0, n))

    def lengths(mean: int) -> list[int]:
        low, high = max(1, round(mean * (1 - spread))), max(1, round(mean * (1 + spread)))
        return [int(x) for x in rng.integers(low, high + 1, n)]

    inputs, outputs = lengths(input_len), lengths(output_len)
    found = [Arrival(float(t), i, o) for t, i, o in zip(at_s, inputs, outputs, strict=True)]
    return at_rate(found, rate)


def random_ids(arrivals: Sequence[Arrival], vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts as token ids; the lowest 10 are left out, where control tokens are."""
    rng = random.Random(seed)
    return [[rng.randrange(10, vocab_size) for _ in range(arrival.num_prompt_tokens)] for arrival in arrivals]


class Texts:
    """Makes texts of an exact number of tokens, the beginning-of-sequence token included.

    Args:
        tokenizer: of the model that is served.

    Raises:
        ValueError: too few of its tokens are whole words.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        texts = {piece.text.strip(" ▁Ġ") for piece in tokenizer.pieces if piece.kind is PieceKind.TEXT}
        words = sorted(text for text in texts if text.isascii() and text.isalpha())
        alone = self._count("") + 1
        self._words = [word for word in words if self._count(f"{word} {word}") == alone + 1]
        if len(self._words) < _LEAST_WORDS:
            raise ValueError(f"only {len(self._words)} of the tokenizer's tokens are words: ask with token ids instead")

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, bos=True, eos=False))

    def make(self, num_tokens: int, rng: random.Random) -> str:
        """Random words.

        Raises:
            ValueError: there is no such text, of fewer tokens than an empty one's.
        """
        words = rng.choices(self._words, k=max(0, num_tokens - self._count("")))
        for _ in range(20):
            text = " ".join(words)
            missing = num_tokens - self._count(text)
            if missing == 0:
                return text
            words = words + rng.choices(self._words, k=missing) if missing > 0 else words[:missing]
        raise ValueError(f"no text of {num_tokens} tokens was found")

"""stories260K: the engine's view of it and the plain one, and prompts."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import torch

from tests.helpers.data import shared_data, stories_reference
from tests.helpers.plain import PlainLlama
from tpserve.convert.convert import convert
from tpserve.engine.text.load import load_tokenizer
from tpserve.engine.text.tokenizer import Tokenizer

EOS = 2
VOCAB_SIZE = 512


def converted(folder: Path) -> Path:
    """The checkpoint, converted into `folder`; the calling test is skipped where there is none."""
    return convert(shared_data("stories260K") / "mp1", folder / "stories260K", progress=False)


@functools.cache
def plain_model(dtype: torch.dtype = torch.float64) -> PlainLlama:
    """The same weights, rounded to `dtype`, as a plain network."""
    return PlainLlama.load(shared_data("stories260K") / "mp1", dtype)


@functools.cache
def tokenizer() -> Tokenizer:
    """Its tokenizer."""
    return load_tokenizer(shared_data("stories260K") / "tokenizer.model")


def prompts(n: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Beginnings of stories, and every third time tokens at random; never longer than `longest`."""
    rng = random.Random(seed)
    texts = [completion["prompt"] + completion["text"] for completion in stories_reference()["completions"]]
    found = []
    for i in range(n):
        length = rng.randint(1, longest)
        ids = tokenizer().encode(texts[i % len(texts)], bos=True, eos=False)
        found.append([rng.randrange(3, VOCAB_SIZE) for _ in range(length)] if i % 3 == 2 else ids[:length])
    return found

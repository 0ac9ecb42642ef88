"""Tokenizers with their grammars, and random walks through what a mask allows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.data import DEMO_CHECKPOINT, shared_data
from tests.text.byte_level import llama3_model
from tpserve.engine.guided import Grammars, Matcher
from tpserve.engine.sampling_params import Guided
from tpserve.engine.text.load import load_tokenizer
from tpserve.engine.text.tokenizer import Tokenizer

PADDING = 37  # rows of the logits beyond the tokenizer's ids
VOCABULARIES = ["demo", "stories260K", "llama2", "llama3"]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name"],
    "additionalProperties": False,
}


class Case:
    """A tokenizer and its grammars."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.size = tokenizer.vocab_size + PADDING
        self.grammars = Grammars(tokenizer, self.size)

    def matcher(self, kind: Any, grammar: Any) -> Matcher:
        return self.grammars.matcher(Guided(kind, grammar if isinstance(grammar, str) else json.dumps(grammar)))

    def allowed(self, matcher: Matcher) -> list[int]:
        words = np.full((self.size + 31) // 32, -1, dtype=np.int32)
        matcher.fill_mask(words)
        return [int(i) for i in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))]

    def walk(self, matcher: Matcher, rng: random.Random, limit: int = 600) -> list[int]:
        """A random answer without its EOS."""
        ids: list[int] = []
        while not matcher.finished:
            assert len(ids) < limit, self.tokenizer.decode(ids)
            allowed = self.allowed(matcher)
            eos = self.tokenizer.eos_id
            token = eos if eos in allowed and rng.random() < 0.3 else rng.choice(allowed)
            assert matcher.advance(token)
            if token not in self.tokenizer.end_ids:
                ids.append(token)
        assert matcher.error is None
        return ids

    def takes(self, matcher: Matcher, text: str) -> bool:
        """The tokenizer's own spelling of a text is an answer."""
        ids = self.tokenizer.encode(text, bos=False, eos=False)
        if self.tokenizer.decode(ids) != text:
            return True  # this tokenizer normalises it: it has no spelling of its own
        return all(matcher.advance(i) for i in ids) and matcher.advance(self.tokenizer.eos_id)


def load_case(name: str) -> Case:
    """One of `VOCABULARIES`."""
    if name == "demo":
        return Case(load_tokenizer(DEMO_CHECKPOINT / "tokenizer.model"))
    if name == "llama3":
        return Case(load_tokenizer(llama3_model()))
    file = {"stories260K": "stories260K/tokenizer.model", "llama2": "tokenizer/llama2_tokenizer.model"}[name]
    return Case(load_tokenizer(Path(shared_data(file))))

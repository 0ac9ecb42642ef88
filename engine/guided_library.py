"""What the grammar library is told: the vocabulary, and each grammar in its language."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np
from llguidance import LLTokenizer, TokenizerWrapper, regex_to_lark
from numpy.typing import NDArray

from tpserve.engine.sampling_params import Guided
from tpserve.engine.text.tokenizer import PieceKind, Tokenizer

MAX_CHARS = {"json": 65536, "regex": 8192, "choice": 65536}  # of a grammar
MAX_DEPTH = 100  # of a schema
MAX_MULTIPLE = 10_000  # least common multiple of a schema's multipleOf, in units of the last decimal: that many states
# Between JSON tokens at most one space, or a line break and an indentation of at most 16: enough for how people and
# models write JSON, and no answer runs on for ever in white space.
_WHITESPACE = r"( |\n {0,16})"
_NOT_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))
# Without this the library allows, where only one text is possible, only the tokens of one way to spell it.
_HEADER = '%llguidance {"no_forcing": true}\n'


class Vocabulary:
    """A model's token ids, as the library knows them and as a mask names them.

    The library's ids: the tokenizer's, then the aliases, then its own end-of-sequence, which is never consumed.

    Attributes:
        size: n, ids below it have a piece.
        library: the tokenizer object of the library.
        end_ids: that end an answer; empty: there are none.
        space_id: the piece that is one space and as the first one contributes nothing; -1: no such piece.
        aliases: piece with a leading space → the library's id of it without.
        only_end: the mask of these alone; nothing without any.
        strips_all_spaces: as the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        pieces = tokenizer.pieces[:vocab_size]
        self.size = len(pieces)
        self._num_words = (vocab_size + 31) // 32
        self.end_ids = frozenset(i for i in tokenizer.end_ids if i < self.size)
        self.strips_all_spaces = tokenizer.strips_all_spaces
        self.space_id = -1
        self.aliases: dict[int, int] = {}
        # No bytes: never allowed. That holds for control pieces, the unknown one, and bytes that UTF-8 lacks (the
        # library marks its own special tokens with 0xFF).
        spelled = [b""] * self.size
        for token_id, (kind, text, data) in enumerate(pieces):
            if kind is PieceKind.TEXT:
                spelled[token_id] = text.encode()
                if tokenizer.strips_first_space and text == " ":
                    self.space_id = token_id
                elif tokenizer.strips_first_space and text.startswith(" "):
                    self.aliases[token_id] = len(spelled)
                    spelled.append(text[1:].encode())
            elif kind is PieceKind.BYTES and not _NOT_UTF8.intersection(data):
                spelled[token_id] = data
        self.library = LLTokenizer(TokenizerWrapper(_Spelled([*spelled, b"end"])))
        self._with_space = np.fromiter(self.aliases.keys(), dtype=np.int64)
        self._without_space = np.fromiter(self.aliases.values(), dtype=np.int64)
        self.only_end = self._pack(np.isin(np.arange(self.size), [*self.end_ids]))

    def later(self, library_words: NDArray[np.int32]) -> NDArray[np.int32]:
        """int32 [ceil(V/32)] of the library's mask, without what ends."""
        mask = np.zeros(self._num_words, dtype=np.int32)
        used = (self.size + 31) // 32
        mask[:used] = library_words[:used]
        if self.size % 32:
            mask[used - 1] &= (1 << self.size % 32) - 1  # aliases share the last word
        return mask

    def first(self, library_words: NDArray[np.int32], very_first: bool) -> NDArray[np.int32]:
        """The same where decoding drops a space; `very_first`: none was dropped yet."""
        bits = np.unpackbits(library_words.view(np.uint8), bitorder="little").astype(bool)
        mask = bits[: self.size].copy()
        mask[self._with_space] = bits[self._without_space]
        if self.space_id >= 0:
            # The natural start of many a text ("▁" and then its first character); once, and only before something.
            mask[self.space_id] = False
            mask[self.space_id] = very_first and bool(mask.any())
        return self._pack(mask)

    def _pack(self, mask: NDArray[np.bool_]) -> NDArray[np.int32]:
        packed = np.zeros(self._num_words * 4, dtype=np.uint8)
        packed[: (self.size + 7) // 8] = np.packbits(mask, bitorder="little")
        return packed.view("<i4")


class _Spelled:
    """What the library's constructor reads of a tokenizer; the last token is its end-of-sequence."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens
        self.eos_token_id = len(tokens) - 1
        self.bos_token_id = None
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError("only masks are asked for, which need no tokenization")


def to_lark(guided: Guided) -> str:
    """The grammar in the library's language.

    Raises:
        ValueError: it is none; the library finds further mistakes.
    """
    text, limit = guided.grammar, MAX_CHARS[guided.kind]
    if len(text) > limit:
        raise ValueError(f"at most {limit} characters, got {len(text)}")
    _check_unicode(text)
    if guided.kind == "regex":
        return f"{_HEADER}start: /{regex_to_lark(text, '')}/"
    try:
        value = json.loads(text or '{"type": "object"}')
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    if guided.kind == "choice":
        if not (isinstance(value, list) and value and all(isinstance(choice, str) for choice in value)):
            raise ValueError("must be a JSON list of at least one string")
        return f"{_HEADER}start: /{'|'.join(map(_literal, value))}/"
    schema = {} if value is True else value
    if not isinstance(schema, dict):
        raise ValueError(f"a schema must be a JSON object, got {text[:100]!r}")
    _check_schema(schema)
    options = {"whitespace_pattern": _WHITESPACE}  # replaces what a user may have put there
    return f"{_HEADER}start: %json {json.dumps(schema | {'x-guidance': options}, allow_nan=False)}"


def _literal(text: str) -> str:
    """A regex that matches `text` alone."""
    _check_unicode(text)
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _check_unicode(text: str) -> None:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("half a surrogate pair is no character")


def _check_schema(schema: dict[str, Any]) -> None:
    multiples = []
    deepest = max(depth for _, _, depth in _walk(schema))
    if deepest > MAX_DEPTH:
        raise ValueError(f"nested {deepest} levels deep, {MAX_DEPTH} are admitted")
    for key, value, _ in _walk(schema):
        if key == "multipleOf" and isinstance(value, int | float):
            if not 1e-9 <= value <= 1e9:
                raise ValueError(f"multipleOf must be from 1e-9 to 1e9, got {value!r}")
            multiples.append(Fraction(str(value)))
    unit = lcm(*(m.denominator for m in multiples))
    if lcm(*(int(m * unit) for m in multiples)) > MAX_MULTIPLE:
        raise ValueError(f"multipleOf leads to more than {MAX_MULTIPLE} states")


def _walk(schema: Any) -> Iterator[tuple[str, Any, int]]:
    """(key or "", value, depth) of everything in a JSON value."""
    stack = [("", schema, 0)]
    while stack:
        yield (entry := stack.pop())
        _, value, depth = entry
        if isinstance(value, dict):
            stack.extend((key, child, depth + 1) for key, child in value.items())
        elif isinstance(value, list):
            stack.extend(("", child, depth + 1) for child in value)


def reason(message: str) -> str:
    """The library's message without where in our Lark text it was and without the text."""
    if message.startswith("NoExtensionBias"):
        return "no text of the model's vocabulary fits"
    if re.search(r"lexer precomputation|too many|Too many|items; max is|too (large|complex)|limit", message):
        return "it is too complex"  # the library would advise on limits that are not the user's
    message = re.sub(r"^at \d+\(\d+\): ", "", message.split("\n   1 | ")[0].split("\n<")[0])
    message = re.sub(r"^invalid regex .*(\(in regex\): (regex parse error:.*\nerror: )?)", "invalid regex: ", message,
                     flags=re.DOTALL)  # fmt: skip
    message = message.removeprefix("failed to compile JSON schema: ")
    return message if len(message) <= 300 else message[:300] + "…"

"""Guided output: which tokens may come next so that an answer is a JSON value of a schema, matches a regex, or is one
of some choices.

What a grammar describes is the text the user gets, `tokenizer.decode(output ids)`. Decoding drops the leading space of
the first piece, so "▁{" stands for "{" there and for " {" later. The library knows tokens as bytes, the same at every
position; so each piece that starts with a space is told to it twice, under its own id and, without the space, under an
alias beyond the vocabulary. The first position reads the aliases, the others the ids.

Masks are a function of the grammar and the advances (the library's limits count operations, never time), so that
all ranks compute the same.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
from llguidance import LLMatcher, LLParserLimits
from numpy.typing import NDArray

from tpserve.engine.errors import RequestError
from tpserve.engine.guided_library import Vocabulary, reason, to_lark
from tpserve.engine.sampling_params import Guided
from tpserve.engine.text.tokenizer import Tokenizer

# The library's defaults allow 0.5 GB of states and 15 ms a mask; these a fifth and a quarter, and no sane grammar is
# near.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000, step_lexer_fuel=50_000, step_max_items=50_000, max_lexer_states=50_000,
    max_grammar_size=200_000, verbose_errors=False,
)  # fmt: skip
# What one advance was, for `rollback`.
_TOKEN, _DROPPED_SPACE, _END = 0, 1, 2


class Grammars:
    """Compiles grammars for one tokenizer and keeps the last ones compiled.

    Attributes:
        vocabulary: what the library knows of the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, cached: int = 64) -> None:
        """Tells the library the vocabulary: a tenth of a second for 32,000 pieces.

        Args:
            tokenizer: of the model.
            vocab_size: V, of the model's logits; ids that the tokenizer lacks are never allowed.
            cached: so many compiled grammars are kept.
        """
        self.vocabulary = Vocabulary(tokenizer, vocab_size)
        self._cached = cached
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, guided: Guided) -> None:
        """Compiles the grammar, unless it was before; meant for every request, in the users' process.

        Raises:
            RequestError: the grammar is broken, unsupported, too complex, or no text of the vocabulary fits it; with
                field "guided_json", "guided_regex" or "guided_choice" and the reason.
        """
        self._template(guided)

    def matcher(self, guided: Guided) -> Matcher:
        """A matcher at the start of an answer.

        Raises:
            RequestError: as `check`.
        """
        return Matcher(self.vocabulary, self._template(guided).deep_copy(), bytearray())

    def _template(self, guided: Guided) -> LLMatcher:
        key = (guided.kind, guided.grammar)
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
        try:
            template = self._compile(guided)
        except ValueError as e:
            field = f"guided_{guided.kind}"
            raise RequestError(f"{field} cannot be used: {e}", field=field) from None
        with self._lock:
            self._compiled[key] = template
            while len(self._compiled) > self._cached:
                self._compiled.popitem(last=False)
        return template

    def _compile(self, guided: Guided) -> LLMatcher:
        matcher = LLMatcher(self.vocabulary.library, to_lark(guided), log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # what is built lazily may fail too
        if matcher.is_error():
            raise ValueError(reason(matcher.get_error()))
        return matcher


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, vocabulary: Vocabulary, inner: LLMatcher, history: bytearray) -> None:
        self._vocabulary = vocabulary
        self._inner = inner
        self._history = history
        self._cached_mask: NDArray[np.int32] | None = None

    def fork(self) -> Matcher:
        """A matcher in the same state, independent of this one."""
        return Matcher(self._vocabulary, self._inner.deep_copy(), self._history[:])

    def advance(self, token_id: int) -> bool:
        """Takes the answer's next token; False: it is not in the mask, and the state is as before."""
        if not (0 <= token_id < self._vocabulary.size and _has(self._mask(), token_id)):
            return False
        what = _TOKEN
        if token_id in self._vocabulary.end_ids:
            what = _END
        elif self._at_start and token_id == self._vocabulary.space_id:
            what = _DROPPED_SPACE
        else:
            library_id = self._vocabulary.aliases.get(token_id, token_id) if self._at_start else token_id
            # What the mask allows is taken, or breaks the library's limits: then it counts too, and `error` says why.
            taken = self._inner.try_consume_tokens([library_id])
            assert taken == 1 or self._inner.is_error(), f"token {token_id} is in the mask but was refused"
        self._history.append(what)
        self._cached_mask = None
        return True

    def rollback(self, n: int) -> None:
        """Undoes the last `n` advances."""
        assert 0 <= n <= len(self._history), (n, len(self._history))
        if n == 0:
            return
        tokens = self._history[-n:].count(_TOKEN)
        del self._history[-n:]
        if tokens:
            self._inner.rollback(tokens)
        self._cached_mask = None

    def fill_mask(self, words: NDArray[np.int32]) -> None:
        """Writes the tokens that may follow.

        What ends a turn is among them exactly when the answer may end here, and alone when nothing else may follow.

        Args:
            words: [ceil(V/32)]; bit v % 32 of word v // 32 becomes 1 if token v is allowed.
        """
        words[:] = self._mask()

    @property
    def finished(self) -> bool:
        """The answer is complete and nothing more may follow, or `error` says why it cannot be completed.

        In a model without an EOS this alone ends an answer, and one that may end but may also go on goes on.
        """
        if self._ended:
            return True
        return not bool((self._mask() & ~self._vocabulary.only_end).any())

    @property
    def error(self) -> str | None:
        """Why the answer cannot go on although it is not complete: the grammar became too complex on the way, or no
        token of the vocabulary spells what it demands."""
        self._mask()
        return reason(self._inner.get_error()) if self._inner.is_error() else None

    @property
    def _ended(self) -> bool:
        return bool(self._history) and self._history[-1] == _END

    @property
    def _at_start(self) -> bool:
        """Decoding would still drop a space."""
        return not self._history or (self._vocabulary.strips_all_spaces and _TOKEN not in self._history)

    def _mask(self) -> NDArray[np.int32]:
        if self._cached_mask is None:
            self._cached_mask = self._compute_mask()
        return self._cached_mask

    def _compute_mask(self) -> NDArray[np.int32]:
        """int32 [ceil(V/32)]"""
        vocabulary, inner = self._vocabulary, self._inner
        if self._ended or inner.is_stopped():
            return vocabulary.only_end
        library_words = np.zeros((vocabulary.library.vocab_size + 31) // 32, dtype=np.int32)
        inner.unsafe_compute_mask_ptr(library_words.ctypes.data, library_words.nbytes)
        if inner.is_error():
            return vocabulary.only_end
        mask = vocabulary.first(library_words, not self._history) if self._at_start else vocabulary.later(library_words)
        if not mask.any():
            return vocabulary.only_end
        return mask | vocabulary.only_end if inner.is_accepting() else mask


def _has(mask: NDArray[np.int32], token_id: int) -> bool:
    return bool(mask[token_id // 32] >> (token_id % 32) & 1)

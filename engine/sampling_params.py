"""What users may ask of a request: how its tokens are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from tpserve.engine.errors import RequestError

MAX_SEED = 2**64 - 1


class Guided(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an answer must look like.

    Attributes:
        kind: "json" (a JSON schema), "regex", or "choice" (a JSON list of strings, one of which is the answer).
        grammar: in that language.
    """

    kind: Literal["json", "regex", "choice"]
    grammar: str


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """How one request's tokens are chosen. Where nothing else is said, the meaning is vLLM's of the same name.

    A row of logits passes, in this order: penalties, logit_bias, bans (bad_words, min_tokens, the grammar's mask),
    temperature, min_p, top_k, top_p, the draw.

    Attributes:
        max_new_tokens: at most so many tokens; the context's end stops earlier.
        min_tokens: EOS, stop tokens and stop strings do not count before so many tokens.
        temperature: logits are divided by it; 0: greedy.
        top_p: keep the smallest set of most probable tokens whose probability reaches this; 1: all.
        top_k: keep the k most probable tokens; 0: all.
        min_p: keep tokens that are at least so probable relative to the most probable one; 0: all.
        top_p_decay, top_p_min, top_p_reset_ids: after each token top_p is multiplied by the decay, never below the
            minimum; after one of the ids it is what it was at first (Lee et al., "Factuality Enhanced Language
            Models", 2022; FasterTransformer's names).
        repetition_penalty: logits of tokens in prompt or output are divided (if positive) or multiplied by it (Keskar
            et al., CTRL, 2019); 1: off.
        presence_penalty: taken off the logits of tokens in the output.
        frequency_penalty: likewise, times their count.
        logit_bias: token id → added to its logit.
        bad_words: token sequences that are never completed.
        stop: strings that end the output before them.
        stop_token_ids: further tokens that end the request; like EOS they are not part of its output.
        ignore_eos: go on after the end-of-sequence token.
        seed: of the counter-based generator; None: drawn once at admission.
        n: answers.
        best_of: so many are generated, and the n with the highest mean log-probability are returned; None: n.
        logprobs: return each generated token's log-probability under the unmodified distribution, and those of so
            many most probable tokens beside it; None: none.
        prompt_logprobs: the same for the prompt's tokens.
        echo: the prompt stands before the answer.
        cum_log_probs: return the sum of the answer's log-probabilities.
        beam_width: above 1: beam search, with the n best hypotheses as answers, delivered at the end.
        len_penalty: a hypothesis is worth its log-probability divided by its length to this power.
        early_stopping: beam search ends with the first beam_width finished hypotheses; otherwise when no living beam
            can overtake one of them.
        guided: what the answer must look like.
    """

    max_new_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    top_p_decay: float = 1.0
    top_p_min: float = 0.0
    top_p_reset_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    best_of: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    cum_log_probs: bool = False
    beam_width: int = 1
    len_penalty: float = 1.0
    early_stopping: bool = False
    guided: Guided | None = None

    @property
    def num_choices(self) -> int:
        """Sequences that are generated for the request, beams aside."""
        return 1 if self.beam_width > 1 else max(self.n, self.best_of or 1)

    def validate(self) -> None:
        """Checks every field; what the vocabulary and the context allow is checked at submission.

        Raises:
            RequestError: with the field's name and the value.
        """
        for field, rule, ok in _RULES:
            value = getattr(self, field)
            _check(value is None or ok(value), field, rule, value)
        _check(
            self.best_of is None or self.best_of >= self.n, "best_of", f"must be at least n ({self.n})", self.best_of
        )
        _check(self.min_tokens <= self.max_new_tokens, "min_tokens",
               f"must be at most max_new_tokens ({self.max_new_tokens})", self.min_tokens)  # fmt: skip
        if self.beam_width > 1:
            _check(self.n <= self.beam_width, "n", f"must be at most beam_width ({self.beam_width})", self.n)
            _check(self.best_of is None, "best_of", "does not go with beam_width", self.best_of)
            _check(self.temperature == 0, "temperature", "must be 0 with beam_width above 1", self.temperature)


def _finite(low: float, high: float) -> Callable[[float], bool]:
    return lambda x: math.isfinite(x) and low <= x <= high


_LOGPROBS = "must be from 0 to 20"
_IDS = "must hold at most 64 token ids of at least 0"
_RULES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("max_new_tokens", "must be at least 1", lambda x: x >= 1),
    ("min_tokens", "must be at least 0", lambda x: x >= 0),
    ("temperature", "must be a number from 0 to 100", _finite(0, 100)),
    ("top_p", "must be above 0 and at most 1", lambda x: 0 < x <= 1),
    ("top_k", "must be 0 (off) or positive", lambda x: 0 <= x < 2**31),
    ("min_p", "must be from 0 to 1", _finite(0, 1)),
    ("top_p_decay", "must be above 0 and at most 1", lambda x: 0 < x <= 1),
    ("top_p_min", "must be from 0 to 1", _finite(0, 1)),
    ("top_p_reset_ids", _IDS, lambda x: len(x) <= 64 and all(i >= 0 for i in x)),
    ("repetition_penalty", "must be above 0 and at most 100", lambda x: 0 < x <= 100),
    ("presence_penalty", "must be from -100 to 100", _finite(-100, 100)),
    ("frequency_penalty", "must be from -100 to 100", _finite(-100, 100)),
    ("logit_bias", "must hold at most 1024 token ids with finite numbers",
     lambda x: len(x) <= 1024 and all(i >= 0 and math.isfinite(v) for i, v in x.items())),
    ("bad_words", "must hold at most 256 sequences of 1 to 32 tokens",
     lambda x: len(x) <= 256 and all(1 <= len(w) <= 32 for w in x)),
    ("stop", "must hold at most 16 strings of 1 to 256 characters",
     lambda x: len(x) <= 16 and all(1 <= len(s) <= 256 for s in x)),
    ("stop_token_ids", _IDS, lambda x: len(x) <= 64 and all(i >= 0 for i in x)),
    ("seed", "must be from 0 to 2**64 - 1", lambda x: 0 <= x <= MAX_SEED),
    ("n", "must be from 1 to 128", lambda x: 1 <= x <= 128),
    ("best_of", "must be from 1 to 128", lambda x: 1 <= x <= 128),
    ("logprobs", _LOGPROBS, lambda x: 0 <= x <= 20),
    ("prompt_logprobs", _LOGPROBS, lambda x: 0 <= x <= 20),
    ("beam_width", "must be from 1 to 64", lambda x: 1 <= x <= 64),
    ("len_penalty", "must be from -10 to 10", _finite(-10, 10)),
    ("guided", "must hold a grammar of at most 65536 characters", lambda x: len(x.grammar) <= 65536),
)  # fmt: skip


def _check(ok: bool, field: str, rule: str, value: object) -> None:
    if not ok:
        raise RequestError(f"{field} {rule}, got {value!r}", field=field)

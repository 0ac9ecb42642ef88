"""The sampling fields of a request: what each may hold, and what others call it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tpserve.engine import fields, limits
from tpserve.engine.errors import RequestError
from tpserve.engine.sampling_params import Guided, SamplingParams
from tpserve.engine.text.tokenizer import Tokenizer

# SentencePiece puts a space before a text's first word. After a line break there is none, and no piece spans one.
# Byte pairs put none, and some have pieces with line breaks.
_ANCHOR = "\n"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What reading a field needs to know of the model; None: not known, or there is none."""

    tokenizer: Tokenizer | None = None
    size: int | None = None


_UNKNOWN = Vocabulary()

# What other servers call the same. OpenAI and vLLM; TensorRT-LLM and FasterTransformer.
ALIASES: Mapping[str, str] = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "length_penalty": "len_penalty",
    "max_output_len": "max_new_tokens",
    "request_output_len": "max_new_tokens",
    "min_length": "min_tokens",
    "random_seed": "seed",
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
    "embedding_bias": "logit_bias",
    "stop_words_list": "stop",
    "stop_words": "stop",
    "bad_words_list": "bad_words",
    "end_id": "stop_token_ids",
    "output_log_probs": "logprobs",
    "return_log_probs": "logprobs",
    "is_return_log_probs": "logprobs",
    "return_cum_log_probs": "cum_log_probs",
}


def sampling_params(
    given: Mapping[str, Any],
    defaults: SamplingParams,
    vocabulary: Vocabulary = _UNKNOWN,
    max_new_tokens_cap: int | None = None,
) -> SamplingParams:
    """The sampling fields of an object without nulls, over `defaults`; checked.

    Args:
        given: other fields in it are passed over.
        defaults: for fields that it lacks.
        vocabulary: to encode words with.
        max_new_tokens_cap: a higher `max_new_tokens` is lowered to it.

    Raises:
        RequestError: names the field as it was given.
    """
    named = _by_field(given)
    values = {field: _READERS[field](name, value, vocabulary) for field, (name, value) in named.items()}
    if max_new_tokens_cap is not None and "max_new_tokens" in values:
        values["max_new_tokens"] = min(values["max_new_tokens"], max_new_tokens_cap)
    _join_guided(values)
    if values.get("beam_width", 1) > 1:  # the operator's ways of sampling do not apply to a search
        values = {"temperature": 0.0, "best_of": None} | values
    params = SamplingParams(
        **({field: getattr(defaults, field) for field in SamplingParams.__struct_fields__} | values)
    )
    try:
        params.validate()
    except RequestError as e:
        name = named.get(e.field or "", (e.field, None))[0]
        if name == e.field:
            raise
        raise RequestError(f"{name}: {e}", field=name) from None
    if vocabulary.size is not None and vocabulary.tokenizer is None:
        _refuse_text(params, named)
    return params


def _by_field(given: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Our name → (the name that was given, its value)."""
    named: dict[str, tuple[str, Any]] = {}
    for name, value in given.items():
        field = ALIASES.get(name, name)
        if field not in _READERS:
            continue
        if field in named:
            first = named[field][0]
            raise RequestError(f"the request has both {first} and {name}, which are the same; send one", field=name)
        named[field] = name, value
    return named


def _join_guided(values: dict[str, Any]) -> None:
    found = {name: values.pop(name) for name in list(values) if name in _GUIDED}
    if len(found) > 1:
        first, second, *_ = found
        raise RequestError(f"the request has both {first} and {second}; send one of them", field=second)
    for guided in found.values():
        values["guided"] = guided


def _refuse_text(params: SamplingParams, named: Mapping[str, tuple[str, Any]]) -> None:
    """Without a tokenizer there is no text that could be compared."""
    for field in ("stop", "echo"):
        if getattr(params, field):
            name = named.get(field, (field, None))[0]
            raise RequestError(f"this model has no tokenizer: {name} cannot be served", field=name)
    if params.guided is not None:
        name = f"guided_{params.guided.kind}"
        raise RequestError(f"this model has no tokenizer: {name} cannot be served", field=name)


def _bad_words(name: str, value: Any, vocabulary: Vocabulary) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list):
        raise RequestError(f"{name} must be a list of strings or of token ids, got {fields.shown(value)}", field=name)
    limits.at_most(name, len(value), limits.MAX_BAD_WORDS)
    sequences: dict[tuple[int, ...], None] = {}  # an ordered set
    for i, word in enumerate(value):
        where = f"{name}[{i}]"
        try:
            if isinstance(word, str):
                sequences |= dict.fromkeys(_spellings(where, fields.string(where, word), vocabulary.tokenizer))
            else:
                ids = tuple(fields.token_ids(where, word))
                limits.at_most(where, len(ids), limits.MAX_BAD_WORD_TOKENS, "tokens")
                sequences[ids] = None
        except RequestError as e:
            raise RequestError(str(e), field=name) from None
    return tuple(sequences)


def _spellings(where: str, word: str, tokenizer: Tokenizer | None) -> list[tuple[int, ...]]:
    """A word's ids in the middle of a text: at the end of another, and after a space."""
    word = word.lstrip(" ") or word
    if not word:
        raise RequestError(f"{where} is empty")
    if tokenizer is None:
        raise RequestError(f"{where} is a string, and there is no tokenizer to encode it with: send token ids")
    # Encoding megabytes takes seconds.
    at_least = -(-len(word) // tokenizer.max_piece_chars)
    limits.at_most(where, at_least, limits.MAX_BAD_WORD_TOKENS, "or more tokens")
    before = _ANCHOR if tokenizer.strips_first_space else ""
    anchor = tokenizer.encode(before, bos=False, eos=False)
    found = []
    for text in (word, " " + word):
        ids = tokenizer.encode(before + text, bos=False, eos=False)
        if ids[: len(anchor)] == anchor and len(ids) > len(anchor):
            limits.at_most(where, len(ids) - len(anchor), limits.MAX_BAD_WORD_TOKENS, "tokens")
            found.append(tuple(ids[len(anchor) :]))
    if not found:  # spaces only, in a tokenizer that drops those at the end
        raise RequestError(f"{where} has no tokens: {fields.shown(word)}")
    return found


def _stop(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, list):
        limits.at_most(name, len(value), limits.MAX_STOP)
    texts = fields.one_or_more_strings(name, value)
    for i, text in enumerate(texts):
        where = name if isinstance(value, str) else f"{name}[{i}]"
        limits.at_most(where, len(text), limits.MAX_STOP_CHARS, "characters", name)
    return texts


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, list):
        limits.at_most(name, len(value), limits.MAX_STOP_TOKEN_IDS)
    return fields.one_or_more_ids(name, value)


def _biases(name: str, value: Any, vocabulary: Vocabulary) -> dict[int, float]:
    if isinstance(value, Mapping):
        limits.at_most(name, len(value), limits.MAX_LOGIT_BIAS)
    found = fields.dense_biases(name, value, vocabulary.size)
    limits.at_most(name, len(found), limits.MAX_LOGIT_BIAS)
    return found


def _choices(name: str, value: Any) -> Guided:
    choices = fields.strings(name, value)
    if not choices or not all(choices):
        raise RequestError(f"{name} must hold at least one string, and no empty one", field=name)
    return Guided("choice", fields.json_array(choices))


_Reader = Callable[[str, Any, Vocabulary], Any]


def _plain(read: Callable[[str, Any], Any]) -> _Reader:
    return lambda name, value, _vocabulary: read(name, value)


_GUIDED: dict[str, _Reader] = {
    "guided_json": _plain(lambda name, value: Guided("json", fields.json_text(name, value))),
    "guided_regex": _plain(lambda name, value: Guided("regex", fields.string(name, value))),
    "guided_choice": _plain(_choices),
}
_READERS: dict[str, _Reader] = {
    **dict.fromkeys(("max_new_tokens", "min_tokens", "top_k", "seed", "n", "best_of", "beam_width"),
                    _plain(fields.integer)),
    **dict.fromkeys(("temperature", "top_p", "min_p", "top_p_decay", "top_p_min", "repetition_penalty",
                     "presence_penalty", "frequency_penalty", "len_penalty"), _plain(fields.number)),
    **dict.fromkeys(("ignore_eos", "echo", "cum_log_probs", "early_stopping"), _plain(fields.boolean)),
    **dict.fromkeys(("logprobs", "prompt_logprobs"), _plain(fields.count_or_flag)),
    **dict.fromkeys(("top_p_reset_ids", "stop_token_ids"), _plain(_ids)),
    "stop": _plain(_stop),
    "bad_words": _bad_words,
    "logit_bias": _biases,
    **_GUIDED,
}  # fmt: skip
SAMPLING_FIELDS: tuple[str, ...] = tuple(_READERS)

"""Words to stop at, to avoid and to favour, in the forms that TensorRT-LLM and FasterTransformer have for them."""

from __future__ import annotations

from typing import Any

from tpserve.engine import fields
from tpserve.engine.errors import RequestError
from tpserve.engine.text.tokenizer import Tokenizer

_MAX_WORDS = 256
_MAX_WORD_CHARS = 256


def stop_words(name: str, value: Any, tokenizer: Tokenizer | None) -> tuple[list[str], list[int]]:
    """Strings, and tokens, to stop at.

    Args:
        name: of the field.
        value: a string, a list of strings, or token ids as `word_ids` reads them.
        tokenizer: without it words of several tokens cannot be told from the text.

    Raises:
        RequestError: names the field.
    """
    words = word_ids(name, value)
    texts: list[str] = []
    ends: list[int] = []
    for i, word in enumerate(words):
        if isinstance(word, str):
            texts.append(fields.string(name, word))
        elif len(word) == 1:
            ends += word
        elif tokenizer is None or max(word) >= tokenizer.vocab_size:
            raise RequestError(f"{name}[{i}] cannot be written as text by this model's tokenizer", field=name)
        else:
            texts.append(tokenizer.decode(word))
    return [text for text in texts if text], ends


def word_ids(name: str, value: Any) -> list[Any]:
    """Words, as strings or as lists of token ids.

    Empty strings are left out: clients send them for "none". Two rows of numbers are FasterTransformer's form: the
    words' ids one after another, and where each ends, filled up with -1.

    Raises:
        RequestError: names the field.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise RequestError(f"{name} must be a string or a list, got {fields.shown(value)}", field=name)
    if len(value) > _MAX_WORDS:
        raise RequestError(f"{name} has {len(value)} entries, {_MAX_WORDS} are admitted", field=name)
    if value and isinstance(value[0], int):
        value = [value]
    if name.endswith("_list") and len(value) == 2 and all(isinstance(row, list) for row in value):
        ids, ends = value
        if len(ids) == len(ends) and all(isinstance(end, int) for end in ends):
            return _by_ends(name, ids, ends)
    found: list[Any] = []
    for i, word in enumerate(value):
        if isinstance(word, list) and word and isinstance(word[0], str):
            word = word[0] if len(word) == 1 else word
        if isinstance(word, list):
            ids = fields.token_ids(name, word)
            if not ids:
                raise RequestError(f"{name}[{i}] is empty", field=name)
            found.append(ids)
        elif not isinstance(word, str):
            raise RequestError(f"{name}[{i}] must be a string or token ids, got {fields.shown(word)}", field=name)
        elif word:
            found.append(word)
    return found


def _by_ends(name: str, ids: list[Any], ends: list[Any]) -> list[list[int]]:
    words: list[list[int]] = []
    start = 0
    for end in ends:
        if end == -1:
            break
        if not isinstance(end, int) or not start < end <= len(ids):
            raise RequestError(f"{name} ends a word at {fields.shown(end)}, after {start}", field=name)
        words.append(fields.token_ids(name, ids[start:end]))
        start = end
    return words


def biases(words: Any, weights: Any, tokenizer: Tokenizer | None) -> dict[int, float]:
    """What is added to the logits of all tokens of each word; a token of several words gets the sum.

    Raises:
        RequestError: names the field.
    """
    words_name, weights_name = "embedding_bias_words", "embedding_bias_weights"
    texts = fields.one_or_more_strings(words_name, words)
    if not any(texts):
        return {}
    if not isinstance(weights, list):
        weights = [weights]
    if len(texts) != len(weights) or len(texts) > _MAX_WORDS:
        raise RequestError(
            f"{weights_name} has {len(weights)} numbers, {words_name} has {len(texts)} words; there must be as many, "
            f"and at most {_MAX_WORDS}",
            field=weights_name,
        )
    if tokenizer is None:
        raise RequestError(f"this model has no tokenizer: {words_name} cannot be served", field=words_name)
    found: dict[int, float] = {}
    for text, weight in zip(texts, weights, strict=True):
        if len(text) > _MAX_WORD_CHARS:
            raise RequestError(f"{words_name} has a word of more than {_MAX_WORD_CHARS} characters", field=words_name)
        for token_id in dict.fromkeys(tokenizer.encode(text, bos=False, eos=False)):
            found[token_id] = found.get(token_id, 0.0) + fields.number(weights_name, weight)
    return found

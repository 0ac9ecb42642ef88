"""From a request's JSON fields to token ids and sampling parameters; free of torch, shared by every way in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from tpserve.engine import fields
from tpserve.engine.errors import RequestError
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.text.chat import check_dialog, encode_dialog
from tpserve.engine.text.tokenizer import Tokenizer

PROMPT_FIELDS = ("prompt", "prompt_token_ids", "dialog")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt: text, token ids, or a checked dialog's (role, content) pairs.

    Attributes:
        field: where it stood, for messages.
    """

    field: str
    value: str | list[int] | list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """What to generate from, and how."""

    prompt_token_ids: list[int]
    params: SamplingParams


def parse_request(given: Mapping[str, Any], encoder: PromptEncoder, defaults: SamplingParams) -> GenerateRequest:
    """Reads an object with one of `PROMPT_FIELDS` and any of `fields.SAMPLING`.

    Raises:
        RequestError: names the field.
    """
    known = (*PROMPT_FIELDS, *fields.SAMPLING)
    for name in given:
        if name not in known:
            raise fields.unknown_field(name, known)
    given = {name: value for name, value in given.items() if value is not None}
    return GenerateRequest(encoder.encode(read_prompt(given)), sampling_params(given, defaults))


def read_prompt(given: Mapping[str, Any], wanted: str = "prompt") -> Prompt:
    """The one prompt field of an object.

    Args:
        given: the object without nulls.
        wanted: the field to name when there is none.

    Raises:
        RequestError: none, several, or not what it should be.
    """
    named = [name for name in PROMPT_FIELDS if name in given]
    if not named:
        raise RequestError(f"the request has no {wanted}", field=wanted)
    if len(named) > 1:
        raise RequestError(f"the request has both {named[0]} and {named[1]}; send one of them", field=named[1])
    (name,) = named
    if name == "dialog":
        return Prompt(name, read_dialog(given[name], name))
    if name == "prompt":
        return Prompt(name, fields.string(name, given[name]))
    ids = fields.token_ids(name, given[name])
    if not ids:
        raise RequestError(f"{name} is empty", field=name)
    return Prompt(name, ids)


def read_dialog(dialog: Any, field: str) -> list[tuple[str, str]]:
    """A dialog's (role, content) pairs.

    Raises:
        RequestError: names the message by its index.
    """
    messages = check_dialog(dialog, field)
    for i, (_, content) in enumerate(messages):
        try:
            fields.check_unicode(f"{field}[{i}].content", content)
        except RequestError as e:
            raise RequestError(str(e), field=field) from None
    return messages


def sampling_params(
    given: Mapping[str, Any], defaults: SamplingParams, max_new_tokens_cap: int | None = None
) -> SamplingParams:
    """The sampling fields of an object without nulls, over `defaults`; checked.

    Raises:
        RequestError: names the field.
    """
    values = {name: check(name, given[name]) for name, check in fields.SAMPLING.items() if name in given}
    if max_new_tokens_cap is not None and "max_new_tokens" in values:
        values["max_new_tokens"] = min(values["max_new_tokens"], max_new_tokens_cap)
    params = SamplingParams(**({name: getattr(defaults, name) for name in fields.SAMPLING} | values))
    params.validate()
    return params


class PromptEncoder:
    """Encodes prompts and refuses those that the context cannot hold.

    Args:
        tokenizer: None: only token ids are served.
        vocab_size: of the model.
        max_seq_len: tokens of prompt and answer together.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, max_seq_len: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_seq_len = max_seq_len

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt.

        Raises:
            RequestError: names the prompt's field, with the tokens it has and those the context holds.
        """
        if prompt.field == "prompt_token_ids":
            ids = cast(list[int], prompt.value)
        elif self._tokenizer is None:
            raise RequestError("this model has no tokenizer: send prompt_token_ids instead of text", field=prompt.field)
        elif isinstance(prompt.value, str):
            self._check_chars(prompt.field, len(prompt.value))
            ids = self._tokenizer.encode(prompt.value, bos=True, eos=False)
        else:
            messages = cast(list[tuple[str, str]], prompt.value)
            self._check_chars(prompt.field, sum(len(content.strip()) for _, content in messages))
            ids = encode_dialog(self._tokenizer, messages)
        check_prompt(ids, self._max_seq_len, self._vocab_size, prompt.field)
        return ids

    def _check_chars(self, field: str, num_chars: int) -> None:
        # Encoding megabytes takes seconds, during which every other stream would stand still.
        assert self._tokenizer is not None
        at_least = num_chars // self._tokenizer.max_piece_chars
        if at_least >= self._max_seq_len:
            raise _too_long(field, f"at least {at_least}", self._max_seq_len)


def check_prompt(token_ids: list[int], max_seq_len: int, vocab_size: int, field: str = "prompt_token_ids") -> None:
    """Whether the engine can hold a prompt and make at least one token.

    Raises:
        RequestError: it is empty, too long, or holds ids that the vocabulary lacks; gives both numbers.
    """
    if not token_ids:
        raise RequestError(f"{field} is empty", field=field)
    if len(token_ids) >= max_seq_len:
        raise _too_long(field, str(len(token_ids)), max_seq_len)
    worst = min(token_ids) if min(token_ids) < 0 else max(token_ids)
    if not 0 <= worst < vocab_size:
        raise RequestError(f"token id {worst} is outside the vocabulary of {vocab_size}", field=field)


def _too_long(field: str, tokens: str, max_seq_len: int) -> RequestError:
    return RequestError(
        f"{field} has {tokens} tokens; the context holds {max_seq_len}, with at least one to generate", field=field
    )

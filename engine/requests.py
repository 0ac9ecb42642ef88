"""From a request's JSON fields to token ids and sampling parameters; free of torch, shared by every way in."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import msgspec

from tpserve.engine.errors import RequestError
from tpserve.engine.protocol import SamplingParams
from tpserve.engine.text.chat import check_dialog, encode_dialog
from tpserve.engine.text.tokenizer import Tokenizer

PROMPT_FIELDS = ("prompt", "prompt_token_ids", "dialog")
SAMPLING_FIELDS = SamplingParams.__struct_fields__


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """What to generate from.

    Attributes:
        prompt_token_ids: the prompt, BOS and template included.
        params: how tokens are chosen.
    """

    prompt_token_ids: list[int]
    params: SamplingParams


def parse_request(fields: Mapping[str, Any], tokenizer: Tokenizer | None, defaults: SamplingParams) -> GenerateRequest:
    """Checks and encodes one request.

    Args:
        fields: one of `PROMPT_FIELDS`, and any of `SAMPLING_FIELDS`.
        tokenizer: None: only `prompt_token_ids` can be served.
        defaults: of the fields that are not given.

    Raises:
        RequestError: names the field.
    """
    known = (*PROMPT_FIELDS, *SAMPLING_FIELDS)
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise RequestError(f"unknown field {name!r}{hint}", field=name)
    return GenerateRequest(prompt_ids(fields, tokenizer), sampling_params(fields, defaults))


def prompt_ids(fields: Mapping[str, Any], tokenizer: Tokenizer | None) -> list[int]:
    """The token ids of the one prompt field that `fields` must have.

    Raises:
        RequestError: none, several, or not what it should be.
    """
    given = [name for name in PROMPT_FIELDS if fields.get(name) is not None]
    if len(given) != 1:
        what = f"got {' and '.join(given)}" if given else "got none"
        rule = f"exactly one of {', '.join(PROMPT_FIELDS)} is required"
        raise RequestError(f"{rule}, {what}", field=given[0] if given else "prompt")
    field, value = given[0], fields[given[0]]
    if field == "prompt_token_ids":
        ids: list[int] = _convert(value, list[int], field)
        if not ids:
            raise RequestError("prompt_token_ids is empty", field=field)
        return ids
    if tokenizer is None:
        raise RequestError(
            f"{field} needs a tokenizer, and this checkpoint has none: send prompt_token_ids", field=field
        )
    if field == "prompt":
        text = _convert(value, str, field)
        if not text:
            raise RequestError("prompt is empty", field=field)
        return tokenizer.encode(text, bos=True, eos=False)
    return encode_dialog(tokenizer, check_dialog(value))


def sampling_params(fields: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    """The sampling fields among `fields`, over `defaults`; checked.

    Raises:
        RequestError: names the field.
    """
    given = {name: fields[name] for name in SAMPLING_FIELDS if fields.get(name) is not None}
    for name, value in given.items():
        given[name] = _convert(value, _TYPES[name], name)
    params: SamplingParams = msgspec.structs.replace(defaults, **given)
    params.validate()
    return params


def check_prompt(token_ids: list[int], max_seq_len: int, vocab_size: int) -> None:
    """Whether the engine can hold a prompt and make at least one token.

    Raises:
        RequestError: it is empty, too long, or holds ids that the vocabulary lacks; gives both numbers.
    """
    if not token_ids:
        raise RequestError("prompt is empty", field="prompt")
    if len(token_ids) >= max_seq_len:
        raise RequestError(
            f"prompt has {len(token_ids)} tokens; the context holds {max_seq_len}, with at least one to generate",
            field="prompt",
        )
    worst = min(token_ids) if min(token_ids) < 0 else max(token_ids)
    if not 0 <= worst < vocab_size:
        raise RequestError(f"token id {worst} is outside the vocabulary of {vocab_size}", field="prompt_token_ids")


_TYPES = {field.name: field.type for field in msgspec.structs.fields(SamplingParams)}


def _convert(value: Any, kind: Any, field: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, OverflowError) as e:
        raise RequestError(f"{field}: {e}", field=field) from None

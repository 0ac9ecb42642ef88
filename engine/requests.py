"""From a request's JSON fields to token ids and sampling parameters; free of torch, shared by every way in."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

from tpserve.engine import fields
from tpserve.engine.errors import RequestError
from tpserve.engine.guided import Grammars
from tpserve.engine.limits import check_prompt, too_long
from tpserve.engine.sampling_fields import ALIASES, SAMPLING_FIELDS, Vocabulary, sampling_params
from tpserve.engine.sampling_params import Guided, SamplingParams
from tpserve.engine.text.chat import check_dialog, encode_dialog
from tpserve.engine.text.chat_template import ChatTemplate
from tpserve.engine.text.tokenizer import Tokenizer

PROMPT_FIELDS = ("prompt", "prompt_token_ids", "dialog")
URGENCY_FIELDS = ("priority", "timeout_s")
KNOWN_FIELDS = (*PROMPT_FIELDS, *SAMPLING_FIELDS, *URGENCY_FIELDS)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt: text, token ids, or a checked dialog's (role, content) pairs.

    Attributes:
        field: where it stood, for messages.
    """

    field: str
    value: str | list[int] | list[tuple[str, str]]

    @property
    def dialog(self) -> list[tuple[str, str]] | None:
        """The pairs, if it is a dialog."""
        is_dialog = isinstance(self.value, list) and bool(self.value) and isinstance(self.value[0], tuple)
        return cast(list[tuple[str, str]], self.value) if is_dialog else None


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """What to generate from, and how.

    Attributes:
        prompt_text: the prompt as it was written, if it was text.
        priority: lower ones go first.
        timeout_s: from submission to the end; None: as long as it takes.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    prompt_text: str | None = None
    priority: int = 0
    timeout_s: float | None = None


def check_names(given: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    """Refuses fields that nobody reads.

    Raises:
        RequestError: names the nearest one that somebody does.
    """
    for name in given:
        if name not in known and name not in ALIASES:
            raise fields.unknown_field(str(name), known)


def read_urgency(given: Mapping[str, Any]) -> tuple[int, float | None]:
    """`priority` and `timeout_s` of an object without nulls.

    Raises:
        RequestError: names the field.
    """
    priority = fields.integer("priority", given.get("priority", 0))
    if not -(2**31) <= priority < 2**31:
        raise RequestError(f"priority must be from -2**31 to 2**31 - 1, got {priority}", field="priority")
    if "timeout_s" not in given:
        return priority, None
    timeout_s = fields.number("timeout_s", given["timeout_s"])
    if timeout_s <= 0:
        raise RequestError(f"timeout_s must be positive, got {timeout_s:g}", field="timeout_s")
    return priority, timeout_s


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


class RequestReader:
    """Reads requests for one model, and refuses what it cannot serve.

    Args:
        tokenizer: None: only token ids are served.
        vocab_size: of the model.
        max_seq_len: tokens of prompt and answer together.
        check_grammar: raises if a grammar cannot be used; None: it is compiled here and now, which is for those who
            trust whoever wrote it (see `grammar_check`).
        chat_template: of dialogs; None: Meta's, by the tokenizer's control tokens.

    Attributes:
        max_seq_len: the same.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_seq_len: int,
        check_grammar: Callable[[Guided], None] | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self._chat_template = chat_template
        self._vocabulary = Vocabulary(tokenizer, vocab_size)
        self.max_seq_len = max_seq_len
        if check_grammar is None and tokenizer is not None:
            # Made at once: it looks at every piece of the vocabulary, for which no stream should have to wait.
            check_grammar = Grammars(tokenizer, vocab_size).check
        self._check_grammar = check_grammar

    def with_check(self, check_grammar: Callable[[Guided], None]) -> RequestReader:
        """The same reader, with another way to look at grammars."""
        other = copy.copy(self)
        other._check_grammar = check_grammar
        return other

    def read(self, given: Mapping[str, Any], defaults: SamplingParams) -> GenerateRequest:
        """Reads an object of any of `KNOWN_FIELDS`, one of `PROMPT_FIELDS` among them, or their `ALIASES`.

        Raises:
            RequestError: names the field.
        """
        check_names(given, KNOWN_FIELDS)
        given = {name: value for name, value in given.items() if value is not None}
        prompt = read_prompt(given)
        priority, timeout_s = read_urgency(given)
        params = self.params(given, defaults)
        text = prompt.value if isinstance(prompt.value, str) else None
        return GenerateRequest(self.encode(prompt), params, text, priority, timeout_s)

    def params(
        self, given: Mapping[str, Any], defaults: SamplingParams, max_new_tokens_cap: int | None = None
    ) -> SamplingParams:
        """See `sampling_params`; grammars are checked, too.

        Raises:
            RequestError: names the field.
        """
        params = sampling_params(given, defaults, self._vocabulary, max_new_tokens_cap)
        if params.guided is not None and self._check_grammar is not None:
            self._check_grammar(params.guided)
        return params

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt.

        Raises:
            RequestError: names the prompt's field, with the tokens it has and those the context holds.
        """
        tokenizer, vocab_size = self._vocabulary.tokenizer, self._vocabulary.size
        assert vocab_size is not None
        if isinstance(prompt.value, list) and prompt.value and isinstance(prompt.value[0], int):
            ids = prompt.value
        elif tokenizer is None:
            raise RequestError("this model has no tokenizer: send prompt_token_ids instead of text", field=prompt.field)
        elif isinstance(prompt.value, str):
            self._check_chars(tokenizer, prompt.field, len(prompt.value))
            ids = tokenizer.encode(prompt.value, bos=True, eos=False)
        else:
            messages = cast(list[tuple[str, str]], prompt.value)
            self._check_chars(tokenizer, prompt.field, sum(len(content.strip()) for _, content in messages))
            if self._chat_template is None:
                ids = encode_dialog(tokenizer, messages)
            else:
                dialog = [{"role": role, "content": content} for role, content in messages]
                ids = self._chat_template.encode(dialog, prompt.field)
        check_prompt(ids, self.max_seq_len, vocab_size, prompt.field)
        return ids

    def _check_chars(self, tokenizer: Tokenizer, field: str, num_chars: int) -> None:
        # Encoding megabytes takes seconds, during which every other stream would stand still.
        at_least = num_chars // tokenizer.max_piece_chars
        if at_least >= self.max_seq_len:
            raise too_long(field, f"at least {at_least}", self.max_seq_len)

"""The operator's own chat template: a jinja2 file as Hugging Face's models bring them, in a sandbox.

The template never sees what users wrote. Each of their texts is a mark in its place, which behaves like the text when
the template looks at it. In what the template then wrote, names of control tokens become their ids; only after that
are the marks replaced by the texts, and the runs between control tokens encoded as text. So no text of a user's can
become a control token, and it is tokenized together with the words around it, as the model knows it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tpserve.engine.errors import ConfigError, RequestError, public
from tpserve.engine.text.chat_messages import Message
from tpserve.engine.text.marked_text import BOS, EOS, MARK, MARKS, Marks, dumps
from tpserve.engine.text.tokenizer import TextEncoder

# What may be a control token's name in a template.
_NAME = re.compile(r"<[^<>\s]{1,64}>|\[[^\[\]\s]{1,64}\]")
# Marks of turns that are plain text in some tokenizers: [INST], <<SYS>>, <|user|>.
_TAG = re.compile(r"\[/?[A-Z][A-Z_]{0,63}\]|<</?[A-Z]{1,64}>>|<\|[^|<>\s]{1,64}\|>")


class JinjaTemplate:
    """One template; see the module's text.

    Args:
        source: its text.
        tokenizer: of the model.

    Raises:
        ConfigError: it is not a template.
    """

    def __init__(self, source: str, tokenizer: TextEncoder) -> None:
        if any(mark in source for mark in MARKS):
            raise ConfigError("it holds private characters (U+E000, U+E001), which stand for users' texts")
        self._tokenizer = tokenizer
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = dumps
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as e:
            raise ConfigError(str(e)) from None
        self._tags = [tag for tag in dict.fromkeys(_TAG.findall(source)) if tokenizer.special_id(tag) is None]

    @classmethod
    def from_file(cls, path: Path, tokenizer: TextEncoder) -> JinjaTemplate:
        """Reads a file.

        Raises:
            ConfigError: names the file, and the line if it is not a template.
        """
        try:
            return cls(path.read_text(encoding="utf-8"), tokenizer)
        except (OSError, UnicodeDecodeError, ConfigError) as e:
            raise ConfigError(f"chat_template: {path}: {e}") from None

    def __call__(self, messages: Sequence[Message], field: str, max_chars: int) -> list[int]:
        marks = Marks(field)
        shown = [self._shown(message, marks, field) for message in messages]
        return self._encode(self._render(shown, field, max_chars), marks, field, max_chars)

    def _shown(self, message: Message, marks: Marks, field: str) -> dict[str, Any]:
        """A message as templates know it, with marks for what users wrote."""
        for tag in self._tags:
            if tag in message.text:
                raise RequestError(f"{message.where} holds the special tag {tag!r}, which is not allowed", field)
        # Whether a template strips or not, what it puts beside a mark keeps it from the text's ends.
        shown: dict[str, Any] = {"role": message.role, "content": marks.mark(message.content.strip())}
        if message.name is not None:
            shown["name"] = marks.mark(message.name)
        if message.tool_call_id is not None:
            shown["tool_call_id"] = marks.mark(message.tool_call_id)
        if message.tool_calls:
            shown["tool_calls"] = [
                {
                    "type": "function",
                    "function": {"name": marks.mark(call.name), "arguments": marks.mark_all(call.arguments)},
                    "id": marks.mark(call.id or ""),
                }
                for call in message.tool_calls
            ]
        return shown

    def _render(self, messages: list[dict[str, Any]], field: str, max_chars: int) -> str:
        chunks, num_chars = [], 0
        try:
            for chunk in self._template.generate(
                messages=messages,
                bos_token=BOS if self._tokenizer.bos_id >= 0 else "",
                eos_token=EOS if self._tokenizer.eos_id >= 0 else "",
                add_generation_prompt=True,
                tools=None,
            ):
                chunks.append(chunk)
                num_chars += str.__len__(chunk)
                if num_chars > max_chars:
                    raise _too_much(field, max_chars)
        except RequestError:
            raise
        except Exception as e:  # noqa: BLE001 - a template may do whatever Python can, with whatever a request brings
            said = public(MARK.sub("…", str(e))) or type(e).__name__
            raise RequestError(f"{field}: this model's chat template cannot take them: {said}", field) from None
        return "".join(chunks)

    def _encode(self, text: str, marks: Marks, field: str, max_chars: int) -> list[int]:
        ids: list[int] = []
        run: list[str] = []
        room = max_chars
        for part in self._parts(text, marks, field):
            if isinstance(part, str):
                room -= len(part)
                if room < 0:
                    raise _too_much(field, max_chars)
                run.append(part)
            else:
                ids += [*self._text(run), part]
                run.clear()
        return ids + self._text(run)

    def _parts(self, text: str, marks: Marks, field: str) -> list[str | int]:
        """The template's and users' texts, and control tokens."""
        parts: list[str | int] = []
        controls = {BOS: self._tokenizer.bos_id, EOS: self._tokenizer.eos_id}
        end = 0
        for mark in MARK.finditer(text):
            parts += self._own(text[end : mark.start()], field)
            parts.append(controls[mark[0]] if mark[0] in controls else marks.texts[int(mark[1])])
            end = mark.end()
        return parts + self._own(text[end:], field)

    def _own(self, text: str, field: str) -> list[str | int]:
        """Of the template's own text: names of control tokens as their ids."""
        if any(mark in text for mark in MARKS):
            raise RequestError(
                f"{field}: this model's chat template cuts texts in a way that cannot be followed", field
            )
        parts: list[str | int] = []
        end = 0
        for name in _NAME.finditer(text):
            token_id = self._tokenizer.special_id(name[0])
            if token_id is not None:
                parts += [text[end : name.start()], token_id]
                end = name.end()
        return [*parts, text[end:]]

    def _text(self, run: list[str]) -> list[int]:
        text = "".join(run)
        return self._tokenizer.encode(text, bos=False, eos=False) if text else []


def _refuse(message: object = "") -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _too_much(field: str, max_chars: int) -> RequestError:
    return RequestError(
        f"{field}: this model's chat template makes more than {max_chars} characters of them, more than the context "
        f"can hold",
        field,
    )

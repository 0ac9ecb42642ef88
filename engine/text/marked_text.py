"""Users' texts as a template sees them: marks that stand for them and behave like them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tpserve.engine.errors import RequestError

# Private use characters: a user's text may hold them, but it is not looked at before all marks are found.
MARKS = ("\ue000", "\ue001")
BOS, EOS = "\ue000bos\ue001", "\ue000eos\ue001"
MARK = re.compile("\ue000(bos|eos|[0-9]+)\ue001")
_MAX_MARKS = 100_000  # a template that takes texts to pieces makes one a piece


class Marks:
    """The texts of one request.

    Args:
        field: that refusals name.

    Attributes:
        texts: by the number in their marks.
    """

    def __init__(self, field: str) -> None:
        self._field = field
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        """A mark that stands for `text`; an empty text stands for itself, so that it counts as false."""
        if not text:
            return ""
        if len(self.texts) >= _MAX_MARKS:
            raise RequestError(
                f"{self._field}: this model's chat template takes them to more than {_MAX_MARKS} pieces", self._field
            )
        self.texts.append(text)
        marked = _Marked(f"{MARKS[0]}{len(self.texts) - 1}{MARKS[1]}")
        marked._marks, marked._real = self, text
        return marked

    def mark_all(self, value: Any) -> Any:
        """The same for all texts of a JSON value."""
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, list):
            return [self.mark_all(item) for item in value]
        if isinstance(value, dict):
            return {self.mark(key): self.mark_all(item) for key, item in value.items()}
        return value


class _Marked(str):
    """A mark. Its characters are the mark's; its methods are those of the text that it stands for."""

    _marks: Marks  # names that the sandbox keeps from templates
    _real: str

    def __str__(self) -> str:
        return self

    def __hash__(self) -> int:
        return hash(self._real)

    def __iter__(self) -> Iterator[str]:
        return map(self._marks.mark, self._real)


def _asks(name: str) -> Callable[..., Any]:
    """A method that tells something of the text."""

    def method(self: _Marked, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._real, name)(*map(_real, args), **kwargs)

    return method


def _makes(name: str) -> Callable[..., Any]:
    """A method that makes other texts, which are the user's, too."""

    def method(self: _Marked, *args: Any, **kwargs: Any) -> Any:
        made = getattr(self._real, name)(*map(_real, args), **kwargs)
        return self._marks.mark(made) if isinstance(made, str) else type(made)(map(self._marks.mark, made))

    return method


for _name in ("__len__", "__contains__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "startswith",
              "endswith", "find", "rfind", "index", "rindex", "count", "isdigit", "isalpha", "isspace",
              "isupper", "islower"):  # fmt: skip
    setattr(_Marked, _name, _asks(_name))
for _name in ("__getitem__", "strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "partition", "rpartition",
              "replace", "removeprefix", "removesuffix", "upper", "lower", "title", "capitalize"):  # fmt: skip
    setattr(_Marked, _name, _makes(_name))


def dumps(value: Any, indent: int | None = None, **_more: Any) -> str:
    """The filter `tojson` as Hugging Face has it. What holds a user's text becomes the user's."""
    found: list[Marks] = []
    text = json.dumps(_unmarked(value, found), ensure_ascii=False, indent=indent)
    return found[0].mark(text) if found else text


def _unmarked(value: Any, found: list[Marks]) -> Any:
    if isinstance(value, _Marked):
        found.append(value._marks)
        return value._real
    if isinstance(value, list | tuple):
        return [_unmarked(item, found) for item in value]
    if isinstance(value, Mapping):
        return {_unmarked(key, found): _unmarked(item, found) for key, item in value.items()}
    return value


def _real(value: Any) -> Any:
    return value._real if isinstance(value, _Marked) else value

"""What `tpserve eval` reads: documents, their references, and the pieces in which a model sees them. Free of torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tpserve.engine.errors import ConfigError, RequestError
from tpserve.engine.offline import read_jsonl

DOCUMENT_FIELDS = ("source", "document", "article", "text")  # SciTLDR's, XSum's, CNN/DailyMail's, plain
REFERENCE_FIELDS = ("target", "summary", "highlights", "reference")


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, and what people wrote as its summary.

    Attributes:
        references: empty: nobody did.
    """

    text: str
    references: tuple[str, ...] = ()


def read_documents(
    path: Path, document_field: str = "", reference_field: str = "", limit: int | None = None
) -> list[Document]:
    """The documents of a JSONL file, each with its references.

    Args:
        path: an object a line; the document is a text or a list of sentences, which spaces join; so is the reference,
            but that a list is of several.
        document_field, reference_field: empty: the first of the usual ones that the first line has.
        limit: so many from the beginning; None: all.

    Raises:
        ConfigError: there is no such file, or a line lacks what is asked for.
    """
    lines = _lines(path)[:limit]
    document_field = document_field or _known(path, lines[0], "document_field", DOCUMENT_FIELDS)
    reference_field = reference_field or _known(path, lines[0], "reference_field", REFERENCE_FIELDS)
    found = []
    for number, line in enumerate(lines, start=1):
        sentences = _texts(path, number, line, document_field)
        references = _texts(path, number, line, reference_field)
        found.append(Document(" ".join(sentences), tuple(references)))
    return found


def read_texts(path: Path, separator: str, field: str = "text") -> list[str]:
    """The texts of a file, without white space at both ends, which most tokenizers treat each in its own way.

    Args:
        path: .jsonl: an object a line; else a text, which the separator cuts into several.
        separator: empty: it is one.
        field: of the objects.

    Raises:
        ConfigError: there is no such file, no text in it, or a line lacks the field.
    """
    if path.suffix == ".jsonl":
        texts = [" ".join(_texts(path, i, line, field)) for i, line in enumerate(_lines(path), start=1)]
    else:
        try:
            whole = path.read_text(encoding="utf-8")
        except OSError as e:
            raise ConfigError(f"{path} cannot be read: {e.strerror}") from None
        except UnicodeDecodeError as e:
            raise ConfigError(f"{path} is not UTF-8: {e}") from None
        texts = whole.split(separator) if separator else [whole]
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise ConfigError(f"{path} holds no text")
    return texts


def shortened(text: str, num_tokens: Callable[[str], int], limit: int) -> tuple[str, int]:
    """The longest beginning of a text, in whole words, that fits.

    Args:
        text: whose words are parted by white space.
        num_tokens: of the prompt that is made of a beginning; more words make more.
        limit: tokens.

    Returns:
        the beginning (the text itself, if it fits), and how many words were left out.

    Raises:
        ConfigError: not even one word fits.
    """
    if num_tokens(text) <= limit:
        return text, 0
    words = text.split()
    low, high = 0, len(words) - 1  # `low` words fit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if num_tokens(" ".join(words[:middle])) <= limit else (low, middle - 1)
    if low == 0:
        raise ConfigError(f"not one word of a document fits into {limit} tokens with the prompt around it")
    return " ".join(words[:low]), len(words) - low


def windows(num_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """The pieces in which a text is seen, so that every token but the first is predicted once.

    As in Hugging Face's "Perplexity of fixed-length models": each piece begins `stride` tokens after the one before,
    and only what that one has not predicted counts, so that it has at least `window - stride` tokens before it (at a
    text's beginning, all that there are).

    Args:
        num_tokens: of the text.
        window: tokens of a piece.
        stride: from 1 to window - 1.

    Yields:
        (first, end, scored): the piece is [first, end), and [scored, end) of it counts.
    """
    first, scored = 0, 1
    while scored < num_tokens:
        end = min(first + window, num_tokens)
        yield first, end, scored
        first, scored = first + stride, end


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = read_jsonl(path)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from None
    for line in lines:
        if isinstance(line, RequestError):
            raise ConfigError(f"{path}: {line}")
    if not lines:
        raise ConfigError(f"{path} is empty")
    return lines


def _known(path: Path, line: dict[str, Any], option: str, names: tuple[str, ...]) -> str:
    for name in names:
        if name in line:
            return name
    raise ConfigError(f"{path} has none of the fields {', '.join(names)}; name one by {option}")


def _texts(path: Path, number: int, line: dict[str, Any], field: str) -> list[str]:
    value = line.get(field)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{path}, object {number}: {field} must be a text, or a list of texts")
    return texts

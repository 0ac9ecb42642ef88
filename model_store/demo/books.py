"""The books behind the demo model, and how Project Gutenberg's plain-text files become tales.

A cleaned book is one UTF-8 file: every tale is `# title`, then its paragraphs, with blank lines between.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

# A title stands after this many blank lines in every one of these files.
_TITLE_GAP_LINES = 3
_TITLE_MAX_CHARS = 80
_TALE_MIN_CHARS = 600
_ASCII = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--", "\u2013": "-", "\u2026": "..."}
    | {"\ufeff": "", "_": ""}
)
_NOT_A_TITLE = re.compile(r"(?i)^(\[|footnote|chapter\b|part\b|the end|finis|contents|[ivxlc]+\.?$|\*|\()")
_NUMBERING = re.compile(r"^(\d+\*?\s+|Legend \d+\s+|[IVXLC]+\. )")
_FOOTNOTE_MARK = re.compile(r"\s?(\(\d+\)|\[\d+\]|\[[A-Z]\])")
_FUNCTION_WORD = re.compile(r"(?i)\b(the|an?|and|he|she|it|they|you|i|was|is|to|so|that|not)\b")
# Tales that hold up a people for mockery, or words that nobody should be taught by a demo.
_LEFT_OUT = re.compile(r"(?i)\b(jews?|jewess|nigger|negro|negress|negroes|blackamoor|darkies)\b")


@dataclasses.dataclass(frozen=True)
class Book:
    """One Project Gutenberg text.

    Attributes:
        number: its Gutenberg number; the raw file is `<number>.txt`.
        title: as printed.
        first: title line of the first tale; what precedes it (preface, contents) is left out.
        end: title line after the last tale (the editor's notes); None: the end of the text.
    """

    number: int
    title: str
    first: str
    end: str | None = None


BOOKS = (
    Book(503, "The Blue Fairy Book", "THE BRONZE RING"),
    Book(540, "The Red Fairy Book", "THE TWELVE DANCING PRINCESSES"),
    Book(7277, "The Green Fairy Book", "THE BLUE BIRD"),
    Book(640, "The Yellow Fairy Book", "THE CAT AND THE MOUSE IN PARTNERSHIP"),
    Book(5615, "The Pink Fairy Book", "The Cat's Elopement"),
    Book(6746, "The Grey Fairy Book", "Donkey Skin"),
    Book(641, "The Violet Fairy Book", "A TALE OF THE TONTLAWALD"),
    Book(2435, "The Crimson Fairy Book", "Lovely Ilonka"),
    Book(3282, "The Brown Fairy Book", "What the Rose did to the Cypress"),
    Book(3027, "The Orange Fairy Book", "The Story of the Hero Makoma"),
    Book(3454, "The Lilac Fairy Book", "The Shifty Lad"),
    Book(27826, "The Olive Fairy Book", "MADSCHUN", "Transcriber's Note"),
    Book(128, "The Arabian Nights Entertainments", "The Arabian Nights"),
    Book(27200, "Fairy Tales of Hans Christian Andersen", "A STORY"),
    Book(8933, "Popular Tales from the Norse", "TALES FROM THE NORSE", "INTRODUCTION TO APPENDIX"),
    Book(4018, "Japanese Fairy Tales", "MY LORD BAG OF RICE"),
    Book(1751, "Twilight Land", "The Stool of Fortune"),
    Book(4357, "American Fairy Tales", "THE BOX OF ROBBERS"),
    Book(5314, "Household Tales", "The Frog-King, or Iron Henry"),
    Book(7439, "English Fairy Tales", "TOM TIT TOT", "NOTES AND REFERENCES"),
    Book(14241, "More English Fairy Tales", "The Pied Piper", "Notes and References"),
    Book(7885, "Celtic Fairy Tales", "CONNLA AND THE FAIRY MAIDEN", "NOTES AND REFERENCES"),
    Book(7128, "Indian Fairy Tales", "The Lion and the Crane", "Notes and References"),
)


def clean(book: Book, raw: bytes) -> str:
    """Turns a Gutenberg file into tales (see the module's docstring)."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    text = "\n".join(text.translate(_ASCII).splitlines())
    text = re.split(r"\*\*\* ?START OF TH[^\n]*\n", text)[-1]
    text = re.split(r"\n\*\*\* ?END OF TH|\nEnd of (?:the )?Project Gutenberg", text)[0]
    tales: list[tuple[str, list[str]]] = []
    started = False
    for gap_lines, block in _blocks(text):
        title = _title(block) if gap_lines >= _TITLE_GAP_LINES else None
        if title is not None and title.lower() == book.first.lower():
            started, tales = True, []  # the last such line: earlier ones stand in the contents
        elif started and book.end is not None and title is not None and title.lower() == book.end.lower():
            break
        if not started:
            continue
        if title is not None:
            tales.append((title, []))
        elif (paragraph := _paragraph(block)) is not None:
            tales[-1][1].append(paragraph)
    tales = [(title, _without_sources(paragraphs)) for title, paragraphs in tales]
    kept = [(title, paragraphs) for title, paragraphs in tales if _is_tale(paragraphs)]
    return "\n\n".join("\n\n".join([f"# {title}", _opening(body[0]), *body[1:]]) for title, body in kept) + "\n"


def read_tales(path: Path) -> list[tuple[str, list[str]]]:
    """Reads a cleaned book back: (title, paragraphs) of every tale."""
    tales: list[tuple[str, list[str]]] = []
    for block in path.read_text(encoding="utf-8").rstrip("\n").split("\n\n"):
        if block.startswith("# "):
            tales.append((block[2:], []))
        else:
            tales[-1][1].append(block)
    return tales


def _blocks(text: str) -> list[tuple[int, str]]:
    """Paragraphs as they stand, each with the number of blank lines before it."""
    blocks: list[tuple[int, str]] = []
    gap, lines = 0, list[str]()
    for line in [*text.split("\n"), ""]:
        if line.strip():
            lines.append(line)
            continue
        if lines:
            blocks.append((gap, "\n".join(lines)))
            gap, lines = 0, []
        gap += 1
    return blocks


def _title(block: str) -> str | None:
    line = _NUMBERING.sub("", _FOOTNOTE_MARK.sub("", " ".join(block.split("From the")[0].split()))).strip(" .")
    if not line or len(line) > _TITLE_MAX_CHARS or line[-1] in ",;:" or line[0] in "\"'" or _NOT_A_TITLE.match(line):
        return None
    words = line.split()
    return line if sum(word[0].isupper() for word in words) >= 0.4 * len(words) else None


def _paragraph(block: str) -> str | None:
    """One paragraph on one line; verse keeps its lines. None: a footnote, an illustration, a heading, a source."""
    lines = [line.rstrip() for line in block.split("\n")]
    is_verse = len(lines) > 1 and all(line.startswith("  ") or len(line) < 50 for line in lines)
    text = ("\n" if is_verse else " ").join(" ".join(line.split()) for line in lines)
    text = _FOOTNOTE_MARK.sub("", text).strip()
    text = re.sub(r"\[[^\]]*\]", "", text).strip()
    first = block.strip()
    if (
        not text
        or first[0] in "[*"
        or re.match(r"\(\d+\)|Footnote|Contes pop|Slavonic story|From the |\(?(Adapted|Translated) from", first)
    ):
        return None
    if _NOT_A_TITLE.match(text) or (len(text) < 60 and text.upper() == text) or text[-1] not in ".!?'\")-:;,":
        return None
    return text


def _without_sources(paragraphs: list[str]) -> list[str]:
    """Drops lines such as `Grimm.` or `Contes populaires, Sebillot.` at a tale's head and tail."""
    keep = [len(p) > 90 or _FUNCTION_WORD.search(p) is not None for p in paragraphs]
    while paragraphs and not keep[-1]:
        paragraphs, keep = paragraphs[:-1], keep[:-1]
    while paragraphs and not keep[0]:
        paragraphs, keep = paragraphs[1:], keep[1:]
    return paragraphs


def _opening(paragraph: str) -> str:
    """A tale's first words without the printer's capitals: `ONCE upon a time` becomes `Once upon a time`."""
    words = paragraph.split(" ")
    for i, word in enumerate(words[:6]):
        if not (word.isupper() and (len(word) > 1 or word in "AI")):
            break
        words[i] = word.capitalize() if i == 0 else "I" if word == "I" else word.lower()
    return " ".join(words)


def _is_tale(paragraphs: list[str]) -> bool:
    text = " ".join(paragraphs)
    return len(text) >= _TALE_MIN_CHARS and not _LEFT_OUT.search(text)

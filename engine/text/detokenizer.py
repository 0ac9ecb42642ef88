"""Ids to text as they arrive, a constant amount of work a token.

Decoding the whole sequence again for every token would cost O(n²) a request, and cutting its text at any token would
tear multi-byte characters. So text is built from the pieces: by SentencePiece's own rules, or, where tokens are any
bytes, as these bytes' UTF-8.
"""

from __future__ import annotations

import codecs
import copy
from collections.abc import Iterable

from tpserve.engine.text.tokenizer import NO_PIECE, PieceKind, Tokenizer

REPLACEMENT = "\ufffd"


class IncrementalDetokenizer:
    """Text of one sequence.

    The concatenation of what `push` and `finish` return is `tokenizer.decode(all ids)`, and a character whose bytes
    have not all arrived is held back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pieces = tokenizer.pieces
        self._joins_bytes = tokenizer.joins_bytes
        self._strips_first_space = tokenizer.strips_first_space
        self._strips_all_spaces = tokenizer.strips_all_spaces
        self._at_start = True  # leading spaces are still to be dropped
        self._held = bytearray()  # of a character that is not complete: at most 3 bytes between calls

    def copy(self) -> IncrementalDetokenizer:
        """Another that goes on from here."""
        other = copy.copy(self)
        other._held = bytearray(self._held)
        return other

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with `ids`."""
        out: list[str] = []
        for token_id in ids:
            # Rows that only pad the model's vocabulary have no piece.
            kind, text, data = self._pieces[token_id] if token_id < len(self._pieces) else NO_PIECE
            if kind is PieceKind.BYTES:
                self._at_start = False
                self._held += data
                self._take_complete(out)
                continue
            if kind is PieceKind.INVISIBLE and self._joins_bytes:
                continue
            self._give_up(out)  # in SentencePiece even an invisible one ends a run of bytes
            if kind is PieceKind.TEXT and self._at_start:
                text = self._first_text(text)
            elif text:
                self._at_start = False
            out.append(text)
        return "".join(out)

    def finish(self) -> str:
        """The rest: U+FFFD for a character that never was completed, in SentencePiece for each byte of it."""
        out: list[str] = []
        self._give_up(out)
        return "".join(out)

    def _first_text(self, text: str) -> str:
        """Drops the dummy prefix that encoding put before the first word."""
        if self._strips_all_spaces:
            text = text[1:] if text.startswith(" ") else text
            self._at_start = not text
        elif self._strips_first_space:
            self._at_start = False if text.startswith(" ") else not text
            text = text.removeprefix(" ")
        else:
            self._at_start = not text
        return text

    def _take_complete(self, out: list[str]) -> None:
        """Moves whole characters, and bytes that can start none, from `_held` to `out`."""
        if self._joins_bytes:
            text, used = codecs.utf_8_decode(self._held, "replace", False)
            out.append(text)
            del self._held[:used]
            return
        while self._held:
            need = _char_bytes(self._held[0])
            have = 1
            while have < min(need, len(self._held)) and self._held[have] & 0xC0 == 0x80:
                have += 1
            if have == len(self._held) < need:
                return  # may still become a character
            try:
                out.append(self._held[:need].decode("utf-8"))
            except UnicodeDecodeError:
                out.append(REPLACEMENT)
                need = 1
            del self._held[:need]

    def _give_up(self, out: list[str]) -> None:
        # SentencePiece replaces byte by byte (what is held is a prefix of one character, so none stands alone),
        # others what may be a character's beginning as one.
        if self._held:
            bytewise = REPLACEMENT * len(self._held)
            out.append(self._held.decode("utf-8", "replace") if self._joins_bytes else bytewise)
            self._held.clear()


def _char_bytes(lead: int) -> int:
    """Length of the UTF-8 character that starts with `lead`; 1 for a byte that starts none."""
    if lead & 0xE0 == 0xC0:
        return 2
    if lead & 0xF0 == 0xE0:
        return 3
    if lead & 0xF8 == 0xF0:
        return 4
    return 1

"""SentencePiece, as Llama uses it."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Protocol

import sentencepiece

from tpserve.model.checkpoint import CheckpointInfo

SPACE = "\u2581"  # SentencePiece writes a space as this


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used; the message names it."""


class PieceKind(enum.IntEnum):
    """What a token id contributes to decoded text."""

    TEXT = 0
    BYTE = 1
    INVISIBLE = 2  # control pieces: BOS, EOS
    UNKNOWN = 3


class TextEncoder(Protocol):
    """The part of a tokenizer that templates need.

    Attributes:
        bos_id, eos_id: -1 in a model without one.
        max_piece_chars: no token is made from more characters.
    """

    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def max_piece_chars(self) -> int: ...
    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        """Text to ids; never to a control token's, whatever the text is."""

    def special_id(self, name: str) -> int | None:
        """A control token's id; None: there is none of this name."""


class Tokenizer:
    """A SentencePiece model: text to ids and back.

    User text is only ever encoded as text: "<s>" in it becomes the pieces of three characters, never BOS.

    Attributes:
        vocab_size: number of pieces.
        bos_id, eos_id: control ids; `eos_id` is -1 in a model without one.
        max_piece_chars: no piece is made from more characters of text than this.
        pieces: what each id contributes, for the incremental detokeniser.
        strips_first_space, strips_all_spaces: what `decode` drops at the start of a text.
    """

    def __init__(self, path: Path) -> None:
        """Loads the model file.

        Raises:
            TokenizerError: the file is missing or is no SentencePiece model.
        """
        if not path.is_file():
            raise TokenizerError(f"{path} does not exist")
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.Load(model_file=str(path))
        except (RuntimeError, OSError) as e:
            raise TokenizerError(f"{path} is not a SentencePiece model: {e}") from None
        self.vocab_size: int = self._sp.vocab_size()
        self.bos_id: int = self._sp.bos_id()
        self.eos_id: int = self._sp.eos_id()
        self.pieces: list[tuple[PieceKind, str, int]] = [self._piece(i) for i in range(self.vocab_size)]
        self.max_piece_chars = max(len(text) for kind, text, _ in self.pieces if kind is PieceKind.TEXT)
        # The flags live in the model file, and the library does not show them: ask it what it does.
        probe = next((i for i, piece in enumerate(self.pieces) if piece == (PieceKind.TEXT, " ", 0)), None)
        self.strips_first_space = probe is None or self._sp.decode([probe]) == ""
        self.strips_all_spaces = probe is not None and self._sp.decode([probe, probe]) == ""

    @classmethod
    def from_checkpoint(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer of a converted checkpoint; None when it has none.

        Raises:
            CheckpointError: not a converted checkpoint.
            TokenizerError: it names a file that is missing or broken.
        """
        name = CheckpointInfo.read(folder).tokenizer
        return None if name is None else cls(folder / name)

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        """Text to ids, with BOS before and EOS after where asked."""
        ids: list[int] = self._sp.encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def special_id(self, name: str) -> int | None:
        """A control token's id; None: there is none of this name."""
        token_id: int = self._sp.piece_to_id(name)
        return token_id if self._sp.is_control(token_id) else None

    def decode(self, ids: list[int]) -> str:
        """Ids to text; control ids contribute nothing."""
        text: str = self._sp.decode(ids)
        return text

    def _piece(self, token_id: int) -> tuple[PieceKind, str, int]:
        """(kind, text, byte) of one id; `byte` counts for byte pieces only."""
        if self._sp.is_control(token_id):
            return PieceKind.INVISIBLE, "", 0
        if self._sp.is_unknown(token_id):
            return PieceKind.UNKNOWN, self._sp.decode([token_id]), 0
        piece: str = self._sp.id_to_piece(token_id)
        if self._sp.is_byte(token_id):
            return PieceKind.BYTE, "", int(piece[1:-1], 16)
        return PieceKind.TEXT, piece.replace(SPACE, " "), 0

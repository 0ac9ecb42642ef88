"""What the rest knows of a tokenizer, whatever its kind; see `load.py`."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used; the message names it."""


class PieceKind(enum.IntEnum):
    """What a token id contributes to decoded text."""

    TEXT = 0
    BYTES = 1  # that are no text by themselves: of a character, or of several
    INVISIBLE = 2  # control tokens, and ids without a token
    UNKNOWN = 3


class Piece(NamedTuple):
    """One token: `text` of TEXT and UNKNOWN, `data` of BYTES; the other is empty."""

    kind: PieceKind
    text: str = ""
    data: bytes = b""


NO_PIECE = Piece(PieceKind.INVISIBLE)


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


class Tokenizer(ABC):
    """Text to ids and back.

    User text is only ever encoded as text: "<s>" or "<|eot_id|>" in it becomes the tokens of its characters.

    Attributes:
        vocab_size: the highest id and one.
        bos_id, eos_id: control ids; -1 in a model without one.
        end_ids: every id that ends a turn.
        pieces: what each id contributes, for the incremental detokeniser.
        controls: name by id of the control tokens.
        max_piece_chars: no token is made from more characters of text than this.
        joins_bytes: a character may be made from bytes of any tokens; otherwise every byte of it is a token of its own.
        strips_first_space, strips_all_spaces: what `decode` drops at the start of a text.
        chat_template: the checkpoint's own, in jinja2; None: it has none.
    """

    bos_id: int
    eos_id: int
    end_ids: tuple[int, ...]
    pieces: list[Piece]
    controls: Mapping[int, str]
    max_piece_chars: int
    joins_bytes: bool
    strips_first_space: bool
    strips_all_spaces: bool
    chat_template: str | None

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @abstractmethod
    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        """Text to ids, with EOS after it, and BOS before it if the model's prompts have one, where asked."""

    @abstractmethod
    def special_id(self, name: str) -> int | None:
        """A control token's id; None: there is none of this name."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Ids to text; control ids contribute nothing."""


def longest(pieces: Iterable[Piece]) -> int:
    """`max_piece_chars` of these: a token of torn characters is made from as many as it touches."""
    return max(len(piece.text) or len(piece.data.decode("utf-8", "replace")) for piece in pieces)

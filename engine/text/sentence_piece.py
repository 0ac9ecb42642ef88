"""SentencePiece, as LLaMA-1 and Llama-2 use it."""

from __future__ import annotations

import sentencepiece

from tpserve.convert.tokenizer import Tokenizer as Files
from tpserve.engine.text.tokenizer import Piece, PieceKind, Tokenizer

SPACE = "\u2581"  # SentencePiece writes a space as this


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    Args:
        files: of kind "sentencepiece".
    """

    joins_bytes = False

    def __init__(self, files: Files) -> None:
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=files.data)
        self.bos_id: int = self._sp.bos_id()
        self.eos_id: int = self._sp.eos_id()
        self.end_ids = files.eos_token_ids
        self.chat_template = files.chat_template
        self._adds_bos = files.adds_bos and self.bos_id >= 0
        self.pieces = [self._piece(i) for i in range(self._sp.vocab_size())]
        self.controls = {i: self._sp.id_to_piece(i) for i in range(self.vocab_size) if self._sp.is_control(i)}
        self.max_piece_chars = max(len(piece.text) for piece in self.pieces if piece.kind is PieceKind.TEXT)
        # The flags live in the model file, and the library does not show them: ask it what it does.
        probe = next((i for i, piece in enumerate(self.pieces) if piece == (PieceKind.TEXT, " ", b"")), None)
        self.strips_first_space = probe is None or self._sp.decode([probe]) == ""
        self.strips_all_spaces = probe is not None and self._sp.decode([probe, probe]) == ""

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        ids: list[int] = self._sp.encode(text)
        return [self.bos_id] * (bos and self._adds_bos) + ids + [self.eos_id] * (eos and self.eos_id >= 0)

    def special_id(self, name: str) -> int | None:
        token_id: int = self._sp.piece_to_id(name)
        return token_id if self._sp.is_control(token_id) else None

    def decode(self, ids: list[int]) -> str:
        text: str = self._sp.decode(ids)
        return text

    def _piece(self, token_id: int) -> Piece:
        if self._sp.is_control(token_id):
            return Piece(PieceKind.INVISIBLE)
        if self._sp.is_unknown(token_id):
            return Piece(PieceKind.UNKNOWN, self._sp.decode([token_id]))
        piece: str = self._sp.id_to_piece(token_id)
        if self._sp.is_byte(token_id):
            return Piece(PieceKind.BYTES, data=bytes([int(piece[1:-1], 16)]))
        return Piece(PieceKind.TEXT, piece.replace(SPACE, " "))

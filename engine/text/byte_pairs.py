"""Byte-pair encoding by `tokenizers`: a `tokenizer.json`, and Llama-3's ranks.

Ids of control tokens are only ever put in by their ids: the library gets a vocabulary without them, so that it cannot
find them in a text. It encodes; decoding is a matter of joining bytes, and the detokeniser does that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from tpserve.convert.llama3_ranks import BYTE_CHARS, ranks_to_json, read_ranks
from tpserve.convert.tokenizer import Tokenizer as Files
from tpserve.engine.text.detokenizer import IncrementalDetokenizer
from tpserve.engine.text.tokenizer import NO_PIECE, Piece, PieceKind, Tokenizer, TokenizerError, longest

_SPACE = "\u2581"
_BYTES = {char: byte for byte, char in BYTE_CHARS.items()}
_BYTE_NAMES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


class BytePairTokenizer(Tokenizer):
    """A tokenizer of tokens that merges made.

    Args:
        files: of kind "json" or "llama3".
        path: for messages.
        encodes: make the library's encoder now, which of 128,000 tokens takes seconds and 200 MiB; else the first
            `encode` makes it.

    Raises:
        TokenizerError: the file describes another kind of tokenizer, or is damaged.
    """

    strips_all_spaces = False

    def __init__(self, files: Files, path: Path, encodes: bool = True) -> None:
        self._files, self._path = files, path
        if files.kind == "llama3":
            content = ranks_to_json(read_ranks(path, files.data), merges=encodes)
        else:
            content = json.loads(files.data)
        model = content["model"]
        if model.get("type", "BPE") != "BPE" or not isinstance(model.get("merges"), list):
            raise TokenizerError(f"{path}: model.type is {model.get('type')!r}; only BPE is served")
        parts = {part.get("type"): part for key in _PARTS for part in _parts(content.get(key))}
        self.joins_bytes = "ByteLevel" in parts
        if not self.joins_bytes and not model.get("byte_fallback"):
            raise TokenizerError(f"{path} is neither byte-level BPE nor BPE with bytes for unknown characters")
        self.strips_first_space = not self.joins_bytes and ("Strip" in parts or _prepends(parts.get("Metaspace")))
        self.bos_id = -1 if files.bos_token_id is None else files.bos_token_id
        self.eos_id = -1 if files.eos_token_id is None else files.eos_token_id
        self.end_ids, self.chat_template = files.eos_token_ids, files.chat_template
        self._adds_bos = files.adds_bos and self.bos_id >= 0
        self._special = files.controls
        self.controls = {token_id: name for name, token_id in files.controls.items()}
        self.pieces = [NO_PIECE] * files.vocab_size
        added = [token for token in content.get("added_tokens") or [] if token["id"] not in self.controls]
        literal = {token["id"] for token in added}
        unknown = model.get("unk_token")
        for token, token_id in model["vocab"].items():
            if token_id not in self.controls and token_id not in literal:
                self.pieces[token_id] = self._piece(path, token, token == unknown)
        for token in added:
            self.pieces[token["id"]] = Piece(PieceKind.TEXT, token["content"])
        self.max_piece_chars = longest(self.pieces)
        if not self.max_piece_chars:
            raise TokenizerError(f"{path} has no token of text")
        self._encoder = self._build(path, content, added, unknown) if encodes else None

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        if self._encoder is None:
            self._encoder = BytePairTokenizer(self._files, self._path)._encoder
            assert self._encoder is not None
        # Half a surrogate pair is no text; SentencePiece replaces it, too.
        text = text.encode("utf-8", "replace").decode() if not text.isascii() else text
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return [self.bos_id] * (bos and self._adds_bos) + ids + [self.eos_id] * (eos and self.eos_id >= 0)

    def special_id(self, name: str) -> int | None:
        return self._special.get(name)

    def decode(self, ids: list[int]) -> str:
        detokenizer = IncrementalDetokenizer(self)
        return detokenizer.push(ids) + detokenizer.finish()

    def _piece(self, path: Path, token: str, unknown: bool) -> Piece:
        if unknown:
            return Piece(PieceKind.UNKNOWN, token)
        if not self.joins_bytes:
            if token in _BYTE_NAMES:
                return Piece(PieceKind.BYTES, data=_BYTE_NAMES[token])
            return Piece(PieceKind.TEXT, token.replace(_SPACE, " "))
        try:
            data = bytes(_BYTES[char] for char in token)
        except KeyError:
            raise TokenizerError(f"{path}: {token!r} is no token of byte-level BPE") from None
        try:
            return Piece(PieceKind.TEXT, data.decode())
        except UnicodeDecodeError:
            return Piece(PieceKind.BYTES, data=data)

    def _build(
        self, path: Path, content: dict[str, Any], added: list[dict[str, Any]], unknown: str | None
    ) -> tokenizers.Tokenizer:
        vocab = content["model"]["vocab"]
        kept = {token: i for token, i in vocab.items() if i not in self.controls or token == unknown}
        kept |= {token["content"]: token["id"] for token in added}  # the library numbers anew what its model lacks
        # What the library adds after encoding or cuts is ours to decide; a template could name tokens that are gone.
        ours = {"added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
        ours |= {"model": content["model"] | {"vocab": kept}}
        try:
            return tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", **content, **ours}))
        except Exception as e:  # noqa: BLE001 - the library raises no narrower one
            raise TokenizerError(f"{path} is not a tokenizer.json that can be used: {e}") from None


_PARTS = ("normalizer", "pre_tokenizer", "decoder")


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """A component, or those of a sequence."""
    if not isinstance(part, dict):
        return
    inner = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
    if not isinstance(inner, list):
        yield part
        return
    for one in inner:
        yield from _parts(one)


def _prepends(metaspace: dict[str, Any] | None) -> bool:
    """The decoder drops the space that the encoder put before the first word."""
    if metaspace is None:
        return False
    return bool(metaspace.get("add_prefix_space", metaspace.get("prepend_scheme", "always") != "never"))

"""The tokenizer inside a GGUF file → the files that everybody else has. Free of torch.

Model "llama" is SentencePiece's: its pieces, scores and types make a `tokenizer.model`. Model "gpt2" is byte-level BPE:
its tokens and merges make a `tokenizer.json`, with the splitting of words that the file only names.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tpserve.convert.errors import ConvertError
from tpserve.convert.gguf_header import GgufHeader, read_gguf_header
from tpserve.convert.llama3_ranks import BYTE_LEVEL, LLAMA3_SPLIT, byte_pairs

_KEY = "tokenizer.ggml."
# Types of tokens, the same in GGUF and SentencePiece.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_TYPES = range(1, 7)
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SPLITS: dict[str, list[dict[str, Any]]] = {
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL | {"use_regex": False},
    ],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": True}],
    "gpt-2": [BYTE_LEVEL | {"use_regex": True}],
}
_SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "default": "gpt-2", "gpt2": "gpt-2"}


def gguf_tokenizer_files(path: Path) -> tuple[dict[str, bytes], str] | None:
    """Contents by file name, and the name of the main one; None: the file holds no tokenizer.

    Raises:
        ConvertError: the file is damaged, or its tokenizer is of a kind that is not known.
    """
    header = read_gguf_header(path)
    model = header.metadata.get(_KEY + "model")
    if model is None or _KEY + "tokens" not in header.metadata:
        return None
    tokens = header.array(_KEY + "tokens")
    types = header.array(_KEY + "token_type") or [_NORMAL] * len(tokens)
    if not tokens or len(types) != len(tokens) or not all(isinstance(t, str) for t in tokens):
        raise ConvertError(f"{path}: {_KEY}tokens and {_KEY}token_type do not fit together")
    if not all(kind in _TYPES for kind in types):
        raise ConvertError(f"{path}: {_KEY}token_type holds {set(types) - set(_TYPES)}, which no tokenizer has")
    ids = {key: _token_id(header, key, len(tokens)) for key in ("bos_token_id", "unknown_token_id", *_ENDS)}
    for token_id in ids.values():
        if token_id is not None and types[token_id] == _NORMAL:  # some converters did not mark them
            types[token_id] = _CONTROL
    adds_bos = header.metadata.get(_KEY + "add_bos_token")
    if model == "llama":
        name, data, default = "tokenizer.model", _sentencepiece(header, tokens, types, ids), True
    elif model == "gpt2":
        split = _split_name(header)
        name, data, default = "tokenizer.json", _byte_level(header, tokens, types, split), split == "llama-bpe"
    else:
        raise ConvertError(f'{path}: {_KEY}model is {model!r}; "llama" (SentencePiece) and "gpt2" (BPE) are served')
    names = {"bos_token": ids["bos_token_id"], "eos_token": ids["eos_token_id"], "unk_token": ids["unknown_token_id"]}
    config: dict[str, Any] = {key: tokens[i] for key, i in names.items() if i is not None}
    config |= {"add_bos_token": adds_bos if isinstance(adds_bos, bool) else default}
    config |= {"tokenizer_class": "LlamaTokenizer" if model == "llama" else "PreTrainedTokenizerFast"}
    if isinstance(template := header.metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    ends = list(dict.fromkeys(ids[key] for key in _ENDS if ids[key] is not None))
    generation = {"bos_token_id": ids["bos_token_id"], "eos_token_id": ends}
    return {name: data, "tokenizer_config.json": _json(config), "generation_config.json": _json(generation)}, name


def _token_id(header: GgufHeader, key: str, num_tokens: int) -> int | None:
    found = header.metadata.get(_KEY + key)
    if found is None or found in (-1, 0xFFFFFFFF):
        return None
    if not isinstance(found, int) or not 0 <= found < num_tokens:
        raise ConvertError(f"{header.path}: {_KEY}{key} is {found!r}, outside the vocabulary of {num_tokens}")
    return found


def _split_name(header: GgufHeader) -> str:
    pre = header.metadata.get(_KEY + "pre", "default")
    name = _SAME.get(pre, pre) if isinstance(pre, str) else pre
    if name not in _SPLITS:
        known = ", ".join((*_SPLITS, *_SAME))
        raise ConvertError(
            f"{header.path}: {_KEY}pre is {pre!r}, a way to split words that is not known; known: {known}"
        )
    return str(name)


def _byte_level(header: GgufHeader, tokens: list[str], types: list[int], split: str) -> bytes:
    found = [pair.partition(" ") for pair in header.array(_KEY + "merges") if isinstance(pair, str)]
    merges = [(first, second) for first, _, second in found]
    vocab = {token: i for i, token in enumerate(tokens)}
    if not merges or not all(all(m) and {*m, "".join(m)} <= vocab.keys() for m in merges):
        raise ConvertError(f"{header.path}: {_KEY}merges are no pairs of tokens of {_KEY}tokens")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, "special": kind == _CONTROL} | flags
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    return _json(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": _SPLITS[split]},
            "post_processor": None,
            "decoder": BYTE_LEVEL | {"use_regex": True},
            "model": byte_pairs(vocab, merges, ignore_merges=split == "llama-bpe"),
        }
    )


def _sentencepiece(header: GgufHeader, tokens: list[str], types: list[int], ids: dict[str, int | None]) -> bytes:
    """A model file: a protobuf message (google/sentencepiece, `sentencepiece_model.proto`) written field by field."""
    scores = header.array(_KEY + "scores")
    if len(scores) != len(tokens) or not all(isinstance(score, float) for score in scores):
        raise ConvertError(f"{header.path}: {_KEY}scores are not one number a token")
    if types.count(_UNKNOWN) != 1:
        raise ConvertError(f"{header.path}: {types.count(_UNKNOWN)} tokens are of the unknown type, not one")
    model = bytearray()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        text = token.replace(" ", "\u2581") if kind in (_NORMAL, _USER_DEFINED) else token
        model += _field(1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind))
    unknown, bos, eos = types.index(_UNKNOWN), ids["bos_token_id"], ids["eos_token_id"]
    trainer = _field(3, 2) + _field(4, len(tokens)) + _field(35, 1)  # BPE, and bytes for unknown characters
    trainer += _field(40, unknown) + _field(45, tokens[unknown].encode())
    for number, token_id in ((41, bos), (42, eos)):
        trainer += _field(number, -1 if token_id is None else token_id)
        # An empty name would stand for the usual one, "<s>".
        trainer += _field(number + 5, b"\x00none" if token_id is None else tokens[token_id].encode())
    prefix = header.metadata.get(_KEY + "add_space_prefix")
    normalizer = _field(1, b"identity") + _field(3, int(prefix is not False)) + _field(4, 0) + _field(5, 1)
    return bytes(model + _field(2, trainer) + _field(3, normalizer))


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value & (1 << 64) - 1)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()

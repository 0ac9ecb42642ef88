"""Llama-3's `tokenizer.model`: a line a token, its bytes in base64 and its rank. Free of torch.

What is not in the file is fixed in Meta's code (meta-llama/llama3, `llama/tokenizer.py`): the control tokens, which
follow the ranks, and how text is split before pairs are merged.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Any

from tpserve.convert.errors import ConvertError

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d{1,8}")
# The names are those of 3.1 to 3.3; in 3.0 those that are not begin, end, header or eot were reserved and unused.
_NAMED = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
LLAMA3_SPECIAL_TOKENS = (*_NAMED, *(f"<|reserved_special_token_{i}|>" for i in range(3, 256 - len(_NAMED) + 3)))
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_ranks_file(data: bytes) -> bool:
    """Whether a file is of this kind, by its first line."""
    return _LINE.fullmatch(data[: data.find(b"\n") if b"\n" in data[:400] else 400].strip()) is not None


def read_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    """Tokens and their ranks, which are their ids.

    Args:
        path: for messages.
        data: the file's content.

    Raises:
        ConvertError: a line is none, a rank is missing, or a byte is no token: then not every text has ids.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines()):
        if not line.strip():
            continue
        try:
            if not _LINE.fullmatch(line.strip()):
                raise ValueError
            token, rank = line.split()
            decoded = base64.b64decode(token, validate=True)
        except (ValueError, binascii.Error):
            raise ConvertError(
                f"{path} line {number + 1} is not a token in base64 and its rank; download it again"
            ) from None
        if int(rank) != len(ranks) or decoded in ranks:
            raise ConvertError(f"{path} line {number + 1}: its rank is not {len(ranks)}, or its token came before")
        ranks[decoded] = int(rank)
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise ConvertError(f"{path} has no token for some bytes; was the download cut short?")
    return ranks


def ranks_to_json(ranks: dict[bytes, int], merges: bool = True) -> dict[str, Any]:
    """The same tokenizer as the content of a `tokenizer.json`.

    Args:
        ranks: of every token.
        merges: with those; without, it cannot encode. Of 128,000 tokens they take seconds.
    """
    spelled = {token: "".join(BYTE_CHARS[byte] for byte in token) for token in ranks}
    pairs_of: list[tuple[str, str]] = []
    for token in ranks if merges else ():  # in order of their ranks
        # Whatever two tokens make this one, they merge; which of several pairs comes first does not matter much.
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        pairs_of += [(spelled[a], spelled[b]) for a, b in pairs]
    special = [{"id": len(ranks) + i, "content": name, "special": True} for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": _NAMED[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {_NAMED[0]: {"id": _NAMED[0], "ids": [len(ranks)], "tokens": [_NAMED[0]]}},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [one | flags for one in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}]},
        "post_processor": template,
        "decoder": BYTE_LEVEL | {"use_regex": True},
        "model": byte_pairs({spelled[token]: rank for token, rank in ranks.items()}, pairs_of, ignore_merges=True),
    }


# How `tokenizers` writes bytes in JSON: each as a character that can be seen (the table is GPT-2's).
_SEEN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_CHARS = {byte: chr(byte) for byte in _SEEN} | {
    byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in _SEEN)
}
BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def byte_pairs(vocab: dict[str, int], merges: list[tuple[str, str]], ignore_merges: bool) -> dict[str, Any]:
    """The `model` of a `tokenizer.json`; `ignore_merges`: a whole word that is a token stays one."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }

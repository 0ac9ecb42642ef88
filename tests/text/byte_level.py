"""Tokenizers of byte pairs for tests: Meta's own files are not free, so small ones of the same form are trained."""

from __future__ import annotations

import base64
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from tpserve.convert.llama3_ranks import BYTE_CHARS, LLAMA3_SPLIT, ranks_to_json, read_ranks

WORDS = (
    "once upon a time there was the cat and a dog, it's 1234 years' \n\n  indented\tabababba café über 日本語 🦙 x=y+z;"
)
TEXTS = [
    "", " ", "a", WORDS, "  two  spaces ", "tabs\t\tand\r\nlines\n\n\n  end", "1234567 12 3", "it's IT'S we'Ll o'clock",
    "日本語のテキスト", "🦙🦙 \U0001f469\u200d\U0001f467", "e\u0301 ﷽ \u200d\ufeff", "x" * 300, " " * 200,
    "!?...===>>>", "<s> </s> [INST]", "\x00\x7f",
    "ab" * 40, "a<|eot_id|>b", "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n",
]  # fmt: skip


@functools.cache
def llama3_model() -> Path:
    """A ranks file as Llama-3's `tokenizer.model` is: 900 ranks, of which 256 are bytes."""
    words = WORDS.split(" ")
    corpus = [" ".join(words[i % 11 :] + words[: i % 7]) for i in range(300)]
    trained = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(corpus, trainer)
    bytes_of = {char: byte for byte, char in BYTE_CHARS.items()}
    tokens = sorted(trained.get_vocab(), key=trained.token_to_id)
    lines = [b"%s %d\n" % (base64.b64encode(bytes(bytes_of[c] for c in t)), i) for i, t in enumerate(tokens)]
    path = Path(tempfile.mkdtemp(prefix="tpserve-llama3-")) / "tokenizer.model"
    path.write_bytes(b"".join(lines))
    return path


def llama3_json() -> dict[str, Any]:
    """The same as the content of a `tokenizer.json`."""
    path = llama3_model()
    return ranks_to_json(read_ranks(path, path.read_bytes()))


def write_folder(folder: Path, content: dict[str, Any], **others: Any) -> Path:
    """A folder with a `tokenizer.json` and other JSON files, by their names without the ending."""
    folder.mkdir(exist_ok=True)
    for name, value in {"tokenizer": content, **others}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def write_gguf(path: Path, model: str, tokens: list[str], types: list[int], **others: Any) -> Path:
    """A GGUF file without weights; `others` are its further keys of `tokenizer.ggml`."""
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in others.items():
        key = "tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path

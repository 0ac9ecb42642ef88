"""Loads a tokenizer of any kind: what it is is found out from the file."""

from __future__ import annotations

from pathlib import Path

from tpserve.convert.describe import describe
from tpserve.convert.errors import ConvertError
from tpserve.convert.kinds import folder_of
from tpserve.convert.tokenizer import read_tokenizer_files
from tpserve.engine.text.sentence_piece import SentencePieceTokenizer
from tpserve.engine.text.tokenizer import Tokenizer, TokenizerError


def load_tokenizer(path: Path, encodes: bool = True) -> Tokenizer:
    """The tokenizer of a `tokenizer.model` (SentencePiece's or Llama-3's), `tokenizer.json`, GGUF file or folder.

    What stands beside the file (`tokenizer_config.json`, `generation_config.json`, `chat_template.jinja`) counts, too.

    Args:
        path: see above.
        encodes: False: probably only what tokens stand for and which end a turn is asked for, as ranks do; a large
            vocabulary is loaded in a fraction of the time and memory then, and the first `encode` takes the rest.

    Raises:
        TokenizerError: there is none, or none that can be used; the message names the file.
    """
    if not path.exists():
        raise TokenizerError(f"{path} does not exist")
    try:
        files = read_tokenizer_files(path)
    except ConvertError as e:
        raise TokenizerError(str(e)) from None
    if files is None:
        raise TokenizerError(f"{path} holds no tokenizer")
    if files.kind == "sentencepiece":
        return SentencePieceTokenizer(files)
    # Here: who serves a SentencePiece model does not need the library.
    from tpserve.engine.text.byte_pairs import BytePairTokenizer

    return BytePairTokenizer(files, path, encodes)


def checkpoint_tokenizer(path: Path, encodes: bool = True) -> Tokenizer | None:
    """The tokenizer of a checkpoint of any kind, see `load_tokenizer`; None when it has none.

    Raises:
        CheckpointError: not a checkpoint.
        TokenizerError: it names a file that is missing or broken.
    """
    name = describe(path).tokenizer
    return None if name is None else load_tokenizer(folder_of(path) / name, encodes)

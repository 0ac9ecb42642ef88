"""The tokenizer that goes with a checkpoint: found, checked, and described for `model.json`."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

from tpserve.convert.errors import ConvertError
from tpserve.convert.sniff import download_leftover

TOKENIZER_FILE = "tokenizer.model"
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A SentencePiece model: the file's bytes and its special ids (None: it has no such token)."""

    data: bytes
    bos_token_id: int | None
    eos_token_id: int | None


def find_tokenizer(ckpt_dir: Path, tokenizer_path: Path | None, vocab_size: int) -> Tokenizer | None:
    """Reads the tokenizer at `tokenizer_path`, or beside or above the weights; None when there is none to serve.

    Args:
        ckpt_dir: the folder of the weights.
        tokenizer_path: the file the user named; None looks for `tokenizer.model`.
        vocab_size: rows of the model's embedding.

    Raises:
        ConvertError: the file is not a SentencePiece model, or has more pieces than the model has embeddings.
    """
    # Meta's download puts one tokenizer above the folders of all sizes. `ckpt_dir / ".."` would follow a link's target.
    candidates = [tokenizer_path] if tokenizer_path else [d / TOKENIZER_FILE for d in (ckpt_dir, ckpt_dir.parent)]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        if tokenizer_path:
            raise ConvertError(f"{tokenizer_path} does not exist; --tokenizer_path is the tokenizer.model file")
        _log.warning("no %s in %s or above it: the model will serve token-id prompts only", TOKENIZER_FILE, ckpt_dir)
        return None
    leftover = download_leftover(path)
    if leftover:
        raise ConvertError(f"{path} {leftover}")
    data = path.read_bytes()
    if _TIKTOKEN_LINE.fullmatch(data.split(b"\n", 1)[0].strip()):
        _log.warning("%s is a Llama-3 (tiktoken) tokenizer, which is not served yet: token-id prompts only", path)
        return None
    return _load(path, data, vocab_size)


def _load(path: Path, data: bytes, vocab_size: int) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor  # only here: `convert` works without a tokenizer, too

    try:
        processor = SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError):
        raise ConvertError(f"{path} is not a SentencePiece model; is it Llama's tokenizer.model?") from None
    pieces = processor.vocab_size()
    if not 0 < pieces <= vocab_size:
        raise ConvertError(
            f"{path} has {pieces} pieces, but the model's embedding has {vocab_size} rows: it belongs to another model"
        )
    bos, eos = processor.bos_id(), processor.eos_id()
    return Tokenizer(data, bos if bos >= 0 else None, eos if eos >= 0 else None)

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.shards import write_fairscale_checkpoint


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    """A sound two-shard checkpoint without a tokenizer."""
    folder = tmp_path / "source" / "llama-tiny"
    write_fairscale_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_model() -> bytes:
    """A genuine SentencePiece model of 40 pieces: bos 1, eos 2."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    sentences = ["once upon a time there was a little girl who liked to play outside in the park with her dog"] * 4
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=40, model_type="bpe", minloglevel=9
    )
    return model.getvalue()


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, str]]:
    """Hashes of every file under a folder, hidden ones included: equal snapshots mean nothing was touched."""

    def take(folder: Path) -> dict[str, str]:
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    return take

"""Step 1 of 3: Gutenberg files to clean tales, a SentencePiece tokenizer and token arrays.

    python model_store/demo/prepare.py --raw RAW_DIR --out WORK_DIR

RAW_DIR holds `<number>.txt` of every book in `books.py`. WORK_DIR gets `text/<number>.txt`, `tokenizer.model`,
`tokens.npz` (see `train.py`) and `sources.json` (SHA-256 and counts of each cleaned book).
Two runs give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import random
from pathlib import Path

import numpy as np
import sentencepiece as spm
from books import BOOKS, clean, read_tales
from chat import Turn, conversation

VOCAB_SIZE = 2048
N_CONVERSATIONS = 24000
N_VAL_CONVERSATIONS = 400
VAL_SHARE = 0.02

log = logging.getLogger("prepare")
Tale = tuple[str, list[str]]


def clean_books(raw: Path, out: Path) -> list[Tale]:
    """Writes the cleaned books and `sources.json`; returns all their tales."""
    (out / "text").mkdir(parents=True, exist_ok=True)
    tales: list[Tale] = []
    sources = []
    for book in BOOKS:
        path = out / "text" / f"{book.number}.txt"
        path.write_text(clean(book, (raw / f"{book.number}.txt").read_bytes()), encoding="utf-8")
        found = read_tales(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        sources.append({"number": book.number, "title": book.title, "tales": len(found), "sha256": digest})
        tales += found
    (out / "sources.json").write_text(json.dumps(sources, indent=1), encoding="utf-8")
    return tales


def train_tokenizer(tales: list[Tale], conversations: list[list[Turn]], out: Path) -> spm.SentencePieceProcessor:
    """A BPE model with the settings of Llama-2's tokenizer, on every tale and on some questions."""
    corpus = [line for _, paragraphs in tales for paragraph in paragraphs for line in paragraph.split("\n")]
    corpus += [f"[INST] {asked} [/INST]" for turns in conversations[:2000] for asked, _ in turns if "\n" not in asked]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=0.99995,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        unk_surface=" \u2047 ",
        max_sentence_length=16384,
        required_chars="".join(map(chr, range(33, 127))),
        num_threads=1,
        minloglevel=2,
    )
    (out / "tokenizer.model").write_bytes(model.getvalue())
    return spm.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))


def encode_tales(tales: list[Tale], tokenizer: spm.SentencePieceProcessor) -> tuple[np.ndarray, np.ndarray]:
    """All tales end to end, each between BOS and EOS; and where each starts."""
    tokens: list[int] = []
    starts = []
    for _, paragraphs in tales:
        starts.append(len(tokens))
        tokens += [tokenizer.bos_id(), *tokenizer.encode("\n\n".join(paragraphs)), tokenizer.eos_id()]
    return np.array(tokens, dtype=np.uint16), np.array(starts, dtype=np.int64)


def encode_chats(
    conversations: list[list[Turn]], tokenizer: spm.SentencePieceProcessor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Conversations end to end, as Meta's `chat_completion` encodes them; which tokens are answers; the starts."""
    tokens: list[int] = []
    is_answer: list[bool] = []
    starts = []
    for turns in conversations:
        starts.append(len(tokens))
        for i, (asked, told) in enumerate(turns):
            question = [tokenizer.bos_id(), *tokenizer.encode(f"[INST] {asked} [/INST]")]
            # Meta ends the turns of a history with a space; an answer that is being given ends without one.
            space = " " if i + 1 < len(turns) else ""
            turn = [tokenizer.bos_id(), *tokenizer.encode(f"[INST] {asked} [/INST] {told}{space}"), tokenizer.eos_id()]
            assert turn[: len(question)] == question
            learnt = [False] * len(question) + [True] * (len(turn) - len(question))
            if space:
                learnt[-2:] = [False, False]
            tokens += turn
            is_answer += learnt
    return np.array(tokens, dtype=np.uint16), np.array(is_answer), np.array(starts, dtype=np.int64)


def main() -> None:
    """Runs all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rng = random.Random(20231)
    tales = clean_books(options.raw, options.out)
    rng.shuffle(tales)
    n_val = round(VAL_SHARE * len(tales))
    split = {"val": tales[:n_val], "train": tales[n_val:]}
    n_chats = {"val": N_VAL_CONVERSATIONS, "train": N_CONVERSATIONS}
    chats = {s: [conversation(rng.choice(split[s])[1], rng) for _ in range(n_chats[s])] for s in split}
    chats = {s: [turns for turns in chats[s] if turns] for s in split}
    tokenizer = train_tokenizer(split["train"], chats["train"], options.out)
    arrays = {}
    for name in split:
        arrays[f"{name}_tales"], arrays[f"{name}_tale_starts"] = encode_tales(split[name], tokenizer)
        arrays[f"{name}_chats"], arrays[f"{name}_answers"], arrays[f"{name}_chat_starts"] = encode_chats(
            chats[name], tokenizer
        )
        log.info("%s: %d tales, %d tokens", name, len(split[name]), len(arrays[f"{name}_tales"]))
        log.info("%s: %d conversations, %d tokens", name, len(chats[name]), len(arrays[f"{name}_chats"]))
    np.savez(options.out / "tokens.npz", **arrays)  # type: ignore[arg-type]  # numpy types **kwds as its own allow_pickle


if __name__ == "__main__":
    main()

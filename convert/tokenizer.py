"""The tokenizer that goes with a checkpoint: found, checked, and described for `model.json`. Free of torch."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpserve.convert.errors import ConvertError
from tpserve.convert.llama3_ranks import LLAMA3_SPECIAL_TOKENS, is_ranks_file, read_ranks
from tpserve.convert.sniff import download_leftover

TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION_CONFIG, CHAT_TEMPLATE_FILE = "generation_config.json", "chat_template.jinja"
# What a folder needs to be served with its tokenizer.
TOKENIZER_FILES = (TOKENIZER_FILE, TOKENIZER_JSON, TOKENIZER_CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE_FILE)
# Whatever else a checkpoint says, these control tokens end a turn.
END_NAMES = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>")
_BOS_NAMES = ("<|begin_of_text|>", "<s>")
_EOS_NAMES = ("<|end_of_text|>", "</s>", "<|endoftext|>")
_MAX_TOKEN_ID = 1 << 24
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as the files that a folder needs to be served with it, and what they say.

    Attributes:
        files: content by name, one of `TOKENIZER_FILES` each; what a GGUF file holds is translated to them.
        name: of the file among them that text becomes tokens by: `tokenizer.model` (SentencePiece's, or Llama-3's
            ranks) or `tokenizer.json`.
        kind: "sentencepiece", "llama3" or "json".
        vocab_size: the highest id and one.
        bos_token_id, eos_token_id: None: it has no such token.
        eos_token_ids: every id that ends a turn, `eos_token_id` first.
        adds_bos: prompts start with BOS.
        controls: id by name of the control tokens; empty of a SentencePiece model, which knows them itself.
        chat_template: a jinja2 template; None: the checkpoint brings none.
    """

    files: Mapping[str, bytes]
    name: str
    kind: str
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    eos_token_ids: tuple[int, ...] = ()
    adds_bos: bool = True
    controls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None

    @property
    def data(self) -> bytes:
        """The content of the file that `name` names."""
        return self.files[self.name]


def find_tokenizer(ckpt_dir: Path, tokenizer_path: Path | None, vocab_size: int) -> Tokenizer | None:
    """Reads the tokenizer at `tokenizer_path`, or of the checkpoint; None when there is none to serve.

    Args:
        ckpt_dir: the folder of the weights, or a GGUF file.
        tokenizer_path: the file the user named; None looks in `ckpt_dir`, and for `tokenizer.model` above it.
        vocab_size: rows of the model's embedding.

    Raises:
        ConvertError: the file is no tokenizer, or has more tokens than the model has embeddings.
    """
    if tokenizer_path is not None and not tokenizer_path.exists():
        raise ConvertError(f"{tokenizer_path} does not exist; --tokenizer_path is the tokenizer.model file")
    found = read_tokenizer_files(ckpt_dir if tokenizer_path is None else tokenizer_path)
    if found is None:
        _log.warning("no %s in %s or above it: the model will serve token-id prompts only", TOKENIZER_FILE, ckpt_dir)
        return None
    if found.vocab_size > vocab_size:
        raise ConvertError(
            f"{tokenizer_path or ckpt_dir / found.name} has {found.vocab_size} pieces, but the model's embedding has "
            f"{vocab_size} rows: it belongs to another model"
        )
    ends = tuple(i for i in found.eos_token_ids if i < vocab_size)
    return dataclasses.replace(found, eos_token_ids=ends)


def read_tokenizer_files(source: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint of any kind, or of one tokenizer file; None when there is none.

    Args:
        source: a folder (Meta's, Hugging Face's or ours), a GGUF file, or a `tokenizer.model` or `tokenizer.json`,
            beside which the other `TOKENIZER_FILES` are looked for.

    Raises:
        ConvertError: a file cannot be read, or is no tokenizer that can be served; the message names it.
    """
    try:
        path = _main_file(source)
        if path is None:
            return None
        with path.open("rb") as f:
            is_gguf = f.read(4) == b"GGUF"
        if is_gguf:
            from tpserve.convert.gguf_tokenizer import gguf_tokenizer_files  # its packages take a third of a second

            translated = gguf_tokenizer_files(path)
            return None if translated is None else _describe(path, *translated)
        name = TOKENIZER_JSON if path.suffix == ".json" else TOKENIZER_FILE
        beside = {n: path.parent / n for n in TOKENIZER_FILES[2:]}
        files = {name: _read(path), **{n: _read(p) for n, p in beside.items() if p.is_file()}}
        return _describe(path, files, name)
    except OSError as e:
        raise ConvertError(f"{e.filename or source} cannot be read: {e.strerror}") from None


def _main_file(source: Path) -> Path | None:
    if source.is_file():
        return source
    model, as_json = source / TOKENIZER_FILE, source / TOKENIZER_JSON
    if model.is_file() and as_json.is_file():
        # A fine-tuned model's further tokens stand in tokenizer.json only.
        more = _describe(as_json, {TOKENIZER_JSON: _read(as_json)}, TOKENIZER_JSON).vocab_size
        return as_json if more > _describe(model, {TOKENIZER_FILE: _read(model)}, TOKENIZER_FILE).vocab_size else model
    # Meta's download puts one above the folders of all sizes. `source / ".."` would follow a link's target.
    candidates = [model, as_json, *sorted(source.glob("*.gguf"))[:1], source.absolute().parent / TOKENIZER_FILE]
    return next((path for path in candidates if path.is_file()), None)


def _read(path: Path) -> bytes:
    leftover = download_leftover(path)
    if leftover:
        raise ConvertError(f"{path} {leftover}")
    return path.read_bytes()


def _json_object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, a number of ten thousand digits, or too deep
        raise ConvertError(f"{path} is not JSON ({e}); download it again") from None
    if not isinstance(content, dict):
        raise ConvertError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def _describe(path: Path, files: Mapping[str, bytes], name: str) -> Tokenizer:
    """What the files say; `path` is for messages."""
    settings = {n: _json_object(path.parent / n, files[n]) for n in TOKENIZER_FILES[2:4] if n in files}
    config, generation = settings.get(TOKENIZER_CONFIG, {}), settings.get(GENERATION_CONFIG, {})
    data = files[name]
    if name == TOKENIZER_JSON:
        found = _of_json(path, files, config)
    elif is_ranks_file(data):
        num_ranks = len(read_ranks(path, data))
        controls = {special: num_ranks + i for i, special in enumerate(LLAMA3_SPECIAL_TOKENS)}
        bos, eos = controls["<|begin_of_text|>"], controls["<|end_of_text|>"]
        found = Tokenizer(files, name, "llama3", num_ranks + len(controls), bos, eos, controls=controls)
    else:
        found = _of_sentencepiece(path, files, config)
    ends = [found.eos_token_id, *_ids(generation.get("eos_token_id")), *(found.controls.get(n) for n in END_NAMES)]
    return dataclasses.replace(
        found,
        eos_token_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        chat_template=_chat_template(path, files, config),
    )


def _of_sentencepiece(path: Path, files: Mapping[str, bytes], config: Mapping[str, Any]) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor  # only here: `convert` works without a tokenizer, too

    try:
        processor = SentencePieceProcessor(model_proto=files[TOKENIZER_FILE])
    except (RuntimeError, OSError):
        raise ConvertError(f"{path} is not a SentencePiece model; is it Llama's tokenizer.model?") from None
    pieces, bos, eos = processor.vocab_size(), processor.bos_id(), processor.eos_id()
    if pieces <= 0:
        raise ConvertError(f"{path} is a SentencePiece model without pieces")
    ids = {n: processor.piece_to_id(n) for n in END_NAMES}
    controls = {n: i for n, i in ids.items() if processor.is_control(i)}
    return Tokenizer(
        files, TOKENIZER_FILE, "sentencepiece", pieces, bos if bos >= 0 else None, eos if eos >= 0 else None,
        adds_bos=config.get("add_bos_token") is not False, controls=controls,
    )  # fmt: skip


def _of_json(path: Path, files: Mapping[str, bytes], config: Mapping[str, Any]) -> Tokenizer:
    content = _json_object(path, files[TOKENIZER_JSON])
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    added = [token for token in content.get("added_tokens") or [] if isinstance(token, dict)]
    ids = dict(vocab) if isinstance(vocab, dict) else {}
    ids |= {token.get("content"): token.get("id") for token in added}
    if not ids or not all(isinstance(n, str) and type(i) is int and 0 <= i < _MAX_TOKEN_ID for n, i in ids.items()):
        raise ConvertError(f"{path}: model.vocab is no object of tokens and their ids, as byte-pair encoding has it")
    bos, eos = (_token_name(config.get(key)) for key in ("bos_token", "eos_token"))
    bos = bos if bos in ids else None if TOKENIZER_CONFIG in files else next((n for n in _BOS_NAMES if n in ids), None)
    eos = eos if eos in ids else next((n for n in _EOS_NAMES if n in ids), None)
    # By what it is for and by its looks, too: some fine-tuned models do not mark theirs.
    names = [t["content"] for t in added if t.get("special") or t["content"][:2] + t["content"][-2:] == "<||>"]
    names += [n for n in (bos, eos, *END_NAMES) if n is not None and n in ids]
    adds_bos = config.get("add_bos_token")
    if not isinstance(adds_bos, bool):
        adds_bos = bos is not None and _starts_with(content.get("post_processor"), bos)
    return Tokenizer(
        files, TOKENIZER_JSON, "json", max(ids.values()) + 1,
        None if bos is None else ids[bos], None if eos is None else ids[eos],
        adds_bos=adds_bos and bos is not None, controls={n: ids[n] for n in names},
    )  # fmt: skip


def _starts_with(processor: Any, bos: str) -> bool:
    """A post-processor puts BOS before a single text."""
    if not isinstance(processor, dict):
        return False
    if processor.get("type") == "Sequence":
        return any(_starts_with(one, bos) for one in processor.get("processors") or [])
    single = processor.get("single")
    first = single[0] if isinstance(single, list) and single else None
    special = first.get("SpecialToken") if isinstance(first, dict) else None
    return isinstance(special, dict) and special.get("id") == bos


def _token_name(value: Any) -> str | None:
    if isinstance(value, dict):  # as `transformers` writes a token with its properties
        value = value.get("content")
    return value if isinstance(value, str) else None


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if type(i) is int and i >= 0]


def _chat_template(path: Path, files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    if CHAT_TEMPLATE_FILE in files:
        try:
            return files[CHAT_TEMPLATE_FILE].decode()
        except UnicodeDecodeError as e:
            raise ConvertError(f"{path.parent / CHAT_TEMPLATE_FILE} is not UTF-8: {e}") from None
    found = config.get("chat_template")
    if isinstance(found, list):  # several with names
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) and found else None

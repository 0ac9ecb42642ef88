"""Which form a checkpoint has, found out from its files. Free of torch."""

from __future__ import annotations

import enum
import re
from pathlib import Path

from tpserve.convert.errors import ConvertError
from tpserve.model.checkpoint import MODEL_FILE

LEGACY_ARGS_FILE = "model_args.json"
_GGUF_MAGIC = b"GGUF"
_GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_LOOKED_FOR = (
    "consolidated.NN.pth and params.json (Meta), config.json with *.safetensors or pytorch_model*.bin (Hugging Face), "
    f"one *.gguf, {MODEL_FILE} (tpserve), .metadata and {LEGACY_ARGS_FILE} (TorchServe's old tp_llama example)"
)


class Kind(enum.Enum):
    """The forms that are read; the value is what `CheckpointInfo.source` calls it."""

    META = "fairscale"
    HUGGING_FACE = "huggingface"
    GGUF = "gguf"
    TPSERVE = "tpserve"
    LEGACY_DCP = "tp_llama"


def kind_of(path: Path) -> Kind:
    """What lies at `path`.

    Raises:
        ConvertError: nothing that is known; the message says what was looked for.
    """
    if path.is_file():
        return _kind_of_file(path)
    if not path.is_dir():
        raise ConvertError(f"{path} does not exist; a checkpoint is a folder or a .gguf file")
    try:
        names = sorted(p.name for p in path.iterdir())
    except OSError as e:
        raise ConvertError(f"{path} cannot be read: {e.strerror}") from None
    if MODEL_FILE in names:
        return Kind.TPSERVE
    if any(re.fullmatch(r"consolidated\.\d\d\.pth", name) for name in names):
        return Kind.META
    if ".metadata" in names:
        return Kind.LEGACY_DCP
    weights = [n for n in names if n.endswith(".safetensors") or re.fullmatch(r"pytorch_model.*\.bin", n)]
    if "config.json" in names and weights:
        return Kind.HUGGING_FACE
    if any(name.endswith(".gguf") for name in names):
        return Kind.GGUF
    raise ConvertError(f"{path} holds no checkpoint that is read{_hint(names, weights)}; looked for {_LOOKED_FOR}")


def gguf_file(path: Path) -> Path:
    """The file of a GGUF checkpoint.

    Raises:
        ConvertError: the folder holds several, or one of several parts.
    """
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    for file in files:
        if _GGUF_PART.search(file.name):
            raise ConvertError(f"{file} is one of several parts; join them first: llama-gguf-split --merge {file} OUT")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ConvertError(f"{path} holds {len(files)} models ({names}); name the one file")
    return files[0]


def folder_of(path: Path) -> Path:
    """The folder that the files named by `CheckpointInfo.tokenizer` lie in: `path`, or what holds the .gguf file."""
    return path if path.is_dir() else path.parent


def _kind_of_file(path: Path) -> Kind:
    try:
        with path.open("rb") as f:
            magic = f.read(4)
    except OSError as e:
        raise ConvertError(f"{path} cannot be read: {e.strerror}") from None
    if magic == _GGUF_MAGIC or path.suffix == ".gguf":
        return Kind.GGUF
    if path.suffix in (".safetensors", ".bin", ".pth", ".json", ".distcp"):
        raise ConvertError(f"{path} is one file of a checkpoint; name the folder, {path.parent}")
    raise ConvertError(f"{path} is not a .gguf file, and no folder; looked for {_LOOKED_FOR}")


def _hint(names: list[str], weights: list[str]) -> str:
    if weights:
        return f" ({weights[0]}, but no config.json beside it)"
    if "config.json" in names:
        return " (config.json, but no weights beside it: was the download cut short?)"
    if "params.json" in names:
        return " (params.json, but no weights beside it: was the download cut short?)"
    return ""

"""Which files of a Hugging Face repository a Llama needs: one form of the weights, the tokenizer, the configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from fnmatch import fnmatchcase

from tpserve.convert.errors import ConvertError

_BESIDE = (
    "config.json", "generation_config.json", "params.json", "checklist.chk", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "LICENSE*",
)  # fmt: skip
# In the order of preference: a safetensors file holds no pickle, and Hugging Face's .bin no third copy of the weights.
_WEIGHTS = (
    ("", ("model*.safetensors", "model.safetensors.index.json")),
    ("", ("*.safetensors", "*.safetensors.index.json")),
    ("", ("pytorch_model*.bin", "pytorch_model.bin.index.json")),
    ("", ("consolidated.*.pth",)),
    ("original/", ("consolidated.*.pth",)),
)


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Attributes:
        path: in the repository.
        size: in bytes.
        sha256: of its content; None: git keeps it itself, and `blob_id` tells.
        blob_id: git's SHA-1 of it.
    """

    path: str
    size: int
    sha256: str | None
    blob_id: str | None

    @property
    def name(self) -> str:
        """Of the file that it becomes: `original/params.json` → `params.json`."""
        return self.path.rpartition("/")[2]


def choose_files(repo: str, files: Iterable[HubFile], include: str | None = None) -> list[HubFile]:
    """The files to download: small ones first, then the weights.

    Args:
        repo: for messages.
        files: all that the repository has.
        include: pattern of the weights' names, such as `*Q4_K_M.gguf`; None: safetensors before .bin before Meta's.

    Raises:
        ConvertError: there are no weights of a known form, or several to choose from; the message says which.
    """
    by_path = {file.path: file for file in files if file.name not in ("", ".", "..")}
    if include is not None:
        folder = include.rpartition("/")[0]
        weights = [path for path in by_path if fnmatchcase(path, include)]
        folder += "/" if folder else ""
    else:
        for folder, patterns in _WEIGHTS:
            weights = [path for path in by_path if _matches(path, folder, patterns)]
            if weights:
                break
    if not weights:
        ggufs = sorted(path for path in by_path if path.endswith(".gguf"))
        if include is not None:
            raise ConvertError(f"{repo} has no file that --include {include} matches; it has {_listed(by_path)}")
        if len(ggufs) != 1:
            choice = f"; choose one with --include: {_listed(ggufs)}" if ggufs else f"; it has {_listed(by_path)}"
            raise ConvertError(f"{repo} has no safetensors, pytorch_model.bin or consolidated.NN.pth{choice}")
        folder, weights = "", ggufs
    beside = [path for path in by_path if _matches(path, folder, _BESIDE) and path not in weights]
    return [by_path[path] for path in [*sorted(beside), *sorted(weights)]]


def _matches(path: str, folder: str, patterns: Iterable[str]) -> bool:
    name = path.removeprefix(folder)
    return path.startswith(folder) and "/" not in name and any(fnmatchcase(name, p) for p in patterns)


def _listed(paths: Iterable[str]) -> str:
    names = sorted(paths)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "no files"

"""The checkpoint that is served, of whatever kind: what it is, and its weights for the ranks. Free of torch by itself.

A folder that `tpserve convert` wrote is read by `tpserve.model.loader` itself; anything else through `tpserve.convert`,
each rank its own slices, without a copy on the disk.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from tpserve.convert.describe import describe
from tpserve.convert.kinds import Kind, folder_of, kind_of
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError
from tpserve.model.checkpoint import CheckpointInfo, fingerprint

if TYPE_CHECKING:
    from tpserve.convert.source import Source


def describe_checkpoint(path: Path) -> CheckpointInfo:
    """What is served.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be served; the message names the file.
    """
    return describe(path)


def tokenizer_path(path: Path) -> Path | None:
    """The file by which a checkpoint's text becomes tokens; None when it has none.

    Raises:
        CheckpointError: see `describe_checkpoint`.
    """
    name = describe(path).tokenizer
    return None if name is None else folder_of(path) / name


def open_weights(config: EngineConfig) -> Source | None:
    """Where the ranks' weights are, for `load_model`; None: in a converted folder. With "dummy" no weight is looked at.

    Raises:
        CheckpointError: see `describe_checkpoint`.
        ConfigError: the checkpoint is quantised in another way than is asked for.
    """
    path = Path(config.checkpoint_dir)
    kind = kind_of(path)
    if kind is Kind.TPSERVE:
        stored = describe(path).quantization
        if stored is not None and config.quantization not in (None, stored):
            raise ConfigError(
                f"quantization is {config.quantization}, but the weights of {path} are {stored} already; leave it out, "
                "or serve the checkpoint that it was made from"
            )
        return None
    # Here: they need torch, which the process that holds the users' connections does not have.
    from tpserve.convert.open_any import open_any
    from tpserve.convert.source import Source

    return Source(describe(path), (), kind) if config.load_format == "dummy" else open_any(path)


def checkpoint_fingerprint(path: Path) -> str:
    """Tells one content of a checkpoint from another, so that a replaced one is noticed.

    Other people's files bring no sums that could be compared at every launch: their names, sizes and times are.
    """
    if kind_of(path) is Kind.TPSERVE:
        return fingerprint(path)
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file()):
        found = file.stat()
        digest.update(f"{file.name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]

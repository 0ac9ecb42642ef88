"""Any checkpoint as a `Source`: what it is is found out from its files. See `docs/checkpoints.md`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tpserve.convert.describe import describe, tokenizer_files
from tpserve.convert.kinds import Kind, gguf_file, kind_of
from tpserve.convert.source import Source, open_source

__all__ = ["describe", "open_any"]


def open_any(path: Path) -> Source:
    """Opens and checks the checkpoint at `path`, a folder or a .gguf file; no weight but the norms of Meta's is read.

    Raises:
        ConvertError: there is none, or it cannot be read; the message names the file and the key.
    """
    source = _open(path, kind_of(path))
    info = describe(path)
    return dataclasses.replace(source, info=info, tokenizer_files=tokenizer_files(path, info))


def _open(path: Path, kind: Kind) -> Source:
    # Imported when there is one: the packages behind them take their time.
    if kind is Kind.META:
        return open_source(path)
    if kind is Kind.HUGGING_FACE:
        from tpserve.convert.hf_source import open_hf

        return open_hf(path)
    if kind is Kind.GGUF:
        from tpserve.convert.gguf_source import open_gguf

        return open_gguf(gguf_file(path))
    if kind is Kind.LEGACY_DCP:
        from tpserve.convert.legacy_dcp import open_legacy_dcp

        return open_legacy_dcp(path)
    from tpserve.convert.dcp_source import open_dcp

    converted = open_dcp(path)
    return Source(converted.info, converted.tensors, kind, parts=converted.parts)

"""Says what a file is when it is not what its name promises.

A failed download leaves an HTML page, an S3 error or a git-lfs pointer under a checkpoint's name; torch would answer
with an unpickling error that tells nobody what happened.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

_ZIP = b"PK\x03\x04"
# The pickled magic number with which torch < 1.6 began its files (torch/serialization.py, MAGIC_NUMBER).
_LEGACY_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_AGAIN = "download it again"


def download_leftover(path: Path) -> str | None:
    """What a failed download left under this name, or None when the beginning of the file looks innocent.

    Raises:
        OSError: the file cannot be read.
    """
    head = _head(path)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return f"is empty; {_AGAIN}"
    if text.startswith((b"<!doctype html", b"<html")):
        return f"is an HTML page, probably a login or error page of a failed download; {_AGAIN}"
    if text.startswith((b"<?xml", b"<error")):
        return f"is an XML message, probably the error of a download whose link has expired; {_AGAIN}"
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself; run `git lfs pull`"
    return None


def why_not_torch_file(path: Path) -> str | None:
    """Why `torch.load` cannot read this file, or None when it has the outer form of a torch checkpoint.

    Raises:
        OSError: the file cannot be read.
    """
    leftover = download_leftover(path)
    if leftover:
        return leftover
    head = _head(path)
    if head.startswith(_LEGACY_TORCH):
        return None
    if not head.startswith(_ZIP):
        if head[:1] == b"\x80":
            return "is a pickle that torch.save did not write, not weights"
        return f"is not a torch checkpoint (it begins with {head[:16]!r})"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            compressed = any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist())
            order = [archive.read(n) for n in names if n.count("/") == 1 and n.endswith("/byteorder")]
    except zipfile.BadZipFile:
        return f"is truncated ({path.stat().st_size} bytes; the end of the archive is missing); {_AGAIN}"
    if not any(n.count("/") == 1 and n.endswith("/data.pkl") for n in names):
        return "is a zip archive, but not a torch checkpoint (it has no data.pkl)"
    if compressed:
        return (
            "was compressed after torch.save had written it, so its weights cannot be mapped; save it again with torch"
        )
    if order and order[0] != b"little":
        return "was written on a big-endian machine; save it again on a little-endian one"
    return None


def is_legacy_torch_file(path: Path) -> bool:
    """Whether torch < 1.6 wrote this file: one pickle stream, which cannot be mapped into memory."""
    return _head(path).startswith(_LEGACY_TORCH)


def _head(path: Path) -> bytes:
    with path.open("rb") as f:
        return f.read(512)

"""`manifest.json`: SHA-256 and size of every file of a converted folder and the CRC-32 of every chunk of weights.

All are computed while the bytes are written. `tpserve.model.manifest` is the other side.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tpserve.convert.errors import ConvertError
from tpserve.model.checkpoint import MANIFEST_FILE

_READ_BYTES = 1 << 20


class HashedFile:
    """A new file, written from beginning to end and hashed on the way; leaving the `with` block flushes it to disk.

    Attributes:
        position: bytes written so far.
        crc32: of each chunk, by the position at which it begins; who writes a file may fill it in.

    Args:
        path: must not exist.
        md5: compute the MD5, too.
    """

    def __init__(self, path: Path, *, md5: bool = False) -> None:
        self.position = 0
        self.crc32: dict[int, int] = {}
        self._file = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False) if md5 else None
        self._chunk: int | None = None  # where the present one began

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        """Appends all of `data`; returns its length in bytes."""
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            written += self._file.write(view[written:]) or 0
        self._hash.update(view)
        if self._md5 is not None:
            self._md5.update(view)
        if self._chunk is not None:
            self.crc32[self._chunk] = zlib.crc32(view, self.crc32[self._chunk])
        self.position += written
        return written

    def begin_chunk(self) -> None:
        """What is written from here on, up to the next chunk or the end, gets a CRC-32 of its own."""
        self._chunk = self.position
        self.crc32[self.position] = 0

    def hexdigest(self) -> str:
        """SHA-256 of what was written so far."""
        return self._hash.hexdigest()

    def md5_hexdigest(self) -> str:
        """MD5 of what was written so far."""
        assert self._md5 is not None, "made without md5"
        return self._md5.hexdigest()


class Manifest:
    """Collects what is written into one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sha256: dict[str, str] = {}
        self._bytes: dict[str, int] = {}
        self._crc32: dict[str, dict[int, str]] = {}

    def add(self, name: str, file: HashedFile) -> None:
        """Records a finished file."""
        self._sha256[name], self._bytes[name] = file.hexdigest(), file.position
        if file.crc32:
            self._crc32[name] = {position: f"{crc:08x}" for position, crc in file.crc32.items()}

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes and records a small file."""
        with HashedFile(self._folder / name) as f:
            f.write(data)
        self.add(name, f)

    def add_written(self, name: str) -> None:
        """Flushes to disk and records a small file that is there already."""
        path = self._folder / name
        with path.open("rb") as f:
            os.fsync(f.fileno())
        self._sha256[name], self._bytes[name] = file_digest(path, "sha256"), path.stat().st_size

    def write(self) -> None:
        """Writes `manifest.json` itself."""
        fields = {"sha256": self._sha256, "bytes": self._bytes, "crc32": self._crc32}
        text = json.dumps(fields, indent=2) + "\n"
        with HashedFile(self._folder / MANIFEST_FILE) as f:
            f.write(text.encode())


def verify_manifest(folder: Path) -> None:
    """Compares every file of a converted folder with its `manifest.json`.

    Raises:
        ConvertError: a file is missing, not listed, or its size or SHA-256 differs; the message names it.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        sha256, sizes = dict(manifest["sha256"]), dict(manifest["bytes"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConvertError(f"{path} cannot be read ({e}); convert the checkpoint again") from None
    present = {p.name for p in folder.iterdir()} - {MANIFEST_FILE}
    for name in sorted(present ^ set(sha256)):
        what = "is not listed in the manifest" if name in present else "is missing"
        raise ConvertError(f"{folder / name} {what}; convert the checkpoint again")
    for name, expected in sha256.items():
        size = (folder / name).stat().st_size
        if size != sizes.get(name):
            raise ConvertError(f"{folder / name} has {size} bytes, the manifest says {sizes.get(name)}")
        found = file_digest(folder / name, "sha256")
        if found != expected:
            raise ConvertError(f"{folder / name} has SHA-256 {found}, the manifest says {expected}")


def file_digest(path: Path, algorithm: str, on_bytes: Callable[[int], object] = lambda n: None) -> str:
    """Hex digest of a file, read in small pieces.

    Args:
        path: the file.
        algorithm: a name of `hashlib`.
        on_bytes: called with the number of bytes of every piece.
    """
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as f:
        while piece := f.read(_READ_BYTES):
            digest.update(piece)
            on_bytes(len(piece))
    return digest.hexdigest()

"""`manifest.json` as a loader reads it: whether a folder's files are those that were written. Free of torch.

Files of weights are not hashed as a whole: a rank reads its own chunks only. Each chunk has a CRC-32 of its own, which
finds damage and files that were exchanged. It is no signature: whoever can write the folder can write the manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from tpserve.model.checkpoint import MANIFEST_FILE, CheckpointError

WEIGHTS_SUFFIXES = (".distcp", ".safetensors")
_REMEDY = "copy the folder again, or convert the checkpoint again"
_READ_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class StoredManifest:
    """The content of `manifest.json`.

    Attributes:
        folder: that it describes.
        sha256: of every file, as hex.
        sizes: of every file, in bytes.
        crc32: of a file's chunks, by the offset in bytes at which each begins; folders of earlier releases lack it.
    """

    folder: Path
    sha256: dict[str, str]
    sizes: dict[str, int]
    crc32: dict[str, dict[int, int]]

    @classmethod
    def read(cls, folder: Path) -> StoredManifest:
        """Reads `folder/manifest.json`.

        Raises:
            CheckpointError: it is missing or is not a manifest.
        """
        path = folder / MANIFEST_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            sha256 = {str(name): str(digest) for name, digest in fields["sha256"].items()}
            sizes = {str(name): int(size) for name, size in fields["bytes"].items()}
            crc32 = {
                str(name): {int(offset): int(crc, 16) for offset, crc in chunks.items()}
                for name, chunks in fields.get("crc32", {}).items()
            }
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; {_REMEDY}") from None
        except OSError as e:
            raise CheckpointError(f"{path} cannot be read: {e.strerror}") from None
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{path} is damaged or no manifest ({_reason(e)}); {_REMEDY}") from None
        return cls(folder, sha256, sizes, crc32)

    def check_files(self) -> None:
        """Compares the size of every file, and the SHA-256 of those that hold no weights.

        Raises:
            CheckpointError: one is missing or differs; the message names it.
        """
        for name, size in self.sizes.items():
            path = self.folder / name
            try:
                if path.parent != self.folder or not path.is_file():
                    raise CheckpointError(f"{path}, which {MANIFEST_FILE} lists, is no file of this folder; {_REMEDY}")
                found = path.stat().st_size
                if found != size:
                    raise CheckpointError(f"{path} has {found} bytes, {MANIFEST_FILE} says {size}; {_REMEDY}")
                if not name.endswith(WEIGHTS_SUFFIXES):
                    self.check_whole(name)
            except OSError as e:
                raise CheckpointError(f"{path} cannot be read: {e.strerror}; {_REMEDY}") from None

    def check_whole(self, name: str) -> None:
        """Compares a file's SHA-256.

        Raises:
            CheckpointError: it differs, or the manifest does not list it.
            OSError: of the disk.
        """
        path = self.folder / name
        if name not in self.sha256:
            raise CheckpointError(f"{path} is not listed in {MANIFEST_FILE}; {_REMEDY}")
        digest = hashlib.sha256()
        with path.open("rb") as f:
            while piece := f.read(_READ_BYTES):
                digest.update(piece)
        if digest.hexdigest() != self.sha256[name]:
            raise CheckpointError(
                f"{path} is not the file that was written: its SHA-256 is {digest.hexdigest()}, {MANIFEST_FILE} says "
                f"{self.sha256[name]}; {_REMEDY}"
            )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if isinstance(error, KeyError | RecursionError) else str(error)

"""Meta's `checklist.chk`: MD5 sums that came with the download."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tpserve.convert.errors import ConvertError
from tpserve.convert.manifest import file_digest
from tpserve.convert.sniff import download_leftover

CHECKLIST = "checklist.chk"
_LINE = re.compile(r"([0-9a-fA-F]{32})\s+\*?(\S+)")


def read_checklist(ckpt_dir: Path) -> dict[Path, str]:
    """The files that `checklist.chk` lists and that exist, with their MD5; empty when there is no checklist.

    Raises:
        ConvertError: the checklist is not one, or a shard that it lists is missing; the message names the file.
    """
    path = ckpt_dir / CHECKLIST
    if not path.exists():
        return {}
    leftover = download_leftover(path)
    if leftover:
        raise ConvertError(f"{path} {leftover}, or remove it to convert without the check")
    sums = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None or Path(match[2]).name != match[2]:
            raise ConvertError(f"{path}: line {number} is not '<md5>  <file name>': {line[:80]!r}")
        file = ckpt_dir / match[2]
        if file.is_file():
            sums[file] = match[1].lower()
        elif file.suffix == ".pth":
            raise ConvertError(f"{file} is missing, but {CHECKLIST} lists it")
    return sums


def verify_checklist(sums: dict[Path, str], on_bytes: Callable[[int], object] = lambda n: None) -> None:
    """Compares the files with their MD5 sums.

    Raises:
        ConvertError: one differs; the message names it and both sums.
    """
    for file, expected in sums.items():
        found = file_digest(file, "md5", on_bytes)
        if found != expected:
            raise ConvertError(f"{file} is damaged: its MD5 is {found}, {CHECKLIST} says {expected}; download it again")

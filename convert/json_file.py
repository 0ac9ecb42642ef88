"""Small JSON files of a checkpoint, read with care. Free of torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tpserve.convert.errors import ConvertError
from tpserve.convert.sniff import download_leftover

_MAX_BYTES = 64 << 20  # the index of a large model has under 1 MB


def read_json_object(path: Path) -> dict[str, Any]:
    """Parses a file that must hold a JSON object.

    Raises:
        ConvertError: it is missing, too large, or something else; the message names the file.
    """
    if not path.is_file():
        raise ConvertError(f"{path} is missing; it comes with the weights")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConvertError(f"{path} has {path.stat().st_size} bytes, which no such file has")
        leftover = download_leftover(path)
        if leftover:
            raise ConvertError(f"{path} {leftover}")
        return parse_json_object(path, path.read_bytes())
    except OSError as e:
        raise ConvertError(f"{path} cannot be read: {e.strerror}") from None


def parse_json_object(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in a file's content; `path` is for messages.

    Raises:
        ConvertError: it is something else; the message names the file.
    """
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, a number of ten thousand digits, or too deep
        raise ConvertError(f"{path} is not JSON ({e}); download it again") from None
    if not isinstance(content, dict):
        raise ConvertError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content

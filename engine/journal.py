"""Finished lines of an offline batch, kept while the rest is still running, so that an interrupted run can go on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


def digest(line: Any, settings: Any) -> str:
    """What a finished line is recognised by: its own content and everything else that decides its output."""
    return hashlib.sha256(json.dumps([line, settings], sort_keys=True).encode()).hexdigest()


class Journal:
    """`<out>.partial`: one JSON object a line, in order of completion; becomes `<out>`, in order of input, at the end.

    Args:
        out: the final file.
        digests: of the input's lines, in order.
    """

    def __init__(self, out: Path, digests: list[str]) -> None:
        self._out, self._digests = out, digests
        self._path = out.with_name(out.name + ".partial")
        self.results: dict[int, dict[str, Any]] = self._read()
        # What was kept is written anew: the last line of an interrupted run may be torn.
        temporary = self._path.with_name(self._path.name + ".new")
        with temporary.open("w", encoding="utf-8") as f:
            f.writelines(self._line(i, result) for i, result in self.results.items())
        temporary.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, index: int, result: dict[str, Any]) -> None:
        """Keeps one line's result."""
        self.results[index] = result
        self._file.write(self._line(index, result))
        self._file.flush()

    def finish(self) -> None:
        """Writes the final file and drops the journal; every line must have its result."""
        assert len(self.results) == len(self._digests), "lines without a result"
        temporary = self._out.with_name(self._out.name + ".new")
        with temporary.open("w", encoding="utf-8") as f:
            f.writelines(json.dumps(self.results[i], ensure_ascii=False) + "\n" for i in range(len(self._digests)))
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(self._out)
        self._path.unlink()

    def _line(self, index: int, result: dict[str, Any]) -> str:
        return json.dumps({"index": index, "digest": self._digests[index], "result": result}, ensure_ascii=False) + "\n"

    def _read(self) -> dict[int, dict[str, Any]]:
        if not self._path.exists():
            return {}
        kept = {}
        for line in self._path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                index = entry["index"]
                if self._digests[index] == entry["digest"]:
                    kept[index] = entry["result"]
            except (ValueError, KeyError, IndexError, TypeError):
                continue  # torn, or of another input
        return kept

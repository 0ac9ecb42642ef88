"""Files of prompts, and of answers as token ids, in the forms of TensorRT-LLM's `run.py`.

| file | prompts |
|---|---|
| .txt | a prompt a line, empty lines left out; or the whole file is one |
| .csv | token ids with commas between them, a prompt a line |
| .npy | integers [prompts, longest], or [length] of one prompt; padding at both ends of a row is taken off |
| .jsonl | objects as `tpserve.engine.generate` reads them, with sampling fields of their own |
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tpserve.engine.errors import ConfigError, RequestError
from tpserve.engine.offline import read_jsonl

SUFFIXES = (".txt", ".csv", ".npy", ".jsonl")


def read_prompts(path: Path, pad_ids: Collection[int] = (), whole_file: bool = False) -> list[dict[str, Any]]:
    """The prompts of a file, as fields of requests.

    Args:
        path: see the module's text.
        pad_ids: what fills the rows of a .npy file, beside negative numbers.
        whole_file: a .txt file is one prompt.

    Raises:
        ConfigError: the file is not there, or is not what its name says; names the line.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path} must end in one of {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".npy":
            found = _read_npy(path, frozenset(pad_ids))
        elif path.suffix == ".csv":
            found = _read_csv(path)
        elif path.suffix == ".txt":
            text = path.read_text(encoding="utf-8")
            found = [{"prompt": line} for line in ([text] if whole_file else text.splitlines()) if line.strip()]
        else:
            found = _read_jsonl(path)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not UTF-8: {e}") from None
    if not found:
        raise ConfigError(f"{path} holds no prompt")
    return found


def write_csv(path: Path, rows: Sequence[Sequence[int]]) -> None:
    """Token ids, an answer a line."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_npy(path: Path, rows: Sequence[Sequence[int]], pad_id: int) -> None:
    """Token ids as int32 [answers, longest]; shorter answers end with `pad_id`."""
    padded = np.full((len(rows), max(map(len, rows), default=0)), pad_id, dtype=np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    with path.open("wb") as file:  # `np.save` would put another suffix behind the user's
        np.save(file, padded)


def _read_csv(path: Path) -> list[dict[str, Any]]:
    found = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if not any(cell.strip() for cell in row):
                continue
            try:
                found.append({"prompt_token_ids": [int(cell) for cell in row if cell.strip()]})
            except ValueError as e:
                raise ConfigError(f"{path}, line {number}: token ids with commas are wanted: {e}") from None
    return found


def _read_npy(path: Path, pad_ids: frozenset[int]) -> list[dict[str, Any]]:
    try:
        rows = np.load(path)  # objects, which would be pickles, are refused unless they are asked for
    except (ValueError, EOFError) as e:
        raise ConfigError(f"{path} is no array of numbers: {e}") from None
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "iu" or rows.ndim not in (1, 2):
        raise ConfigError(f"{path} must hold integers of one or two dimensions")
    found = []
    for number, row in enumerate(np.atleast_2d(rows).tolist()):
        kept = [i for i, token_id in enumerate(row) if token_id >= 0 and token_id not in pad_ids]
        if not kept:
            raise ConfigError(f"{path}: row {number} is nothing but padding")
        found.append({"prompt_token_ids": row[kept[0] : kept[-1] + 1]})
    return found


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in read_jsonl(path):
        if isinstance(line, RequestError):
            raise ConfigError(f"{path}: {line}")
        found.append(line)
    return found


def rows_of(results: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The token ids of results as `results.whole` gives them: one row an answer."""
    return [answer["ids"] for result in results for answer in result.get("choices", [result])]

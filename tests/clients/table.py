"""What the clients told, as docs/clients.md."""

from __future__ import annotations

import dataclasses
import datetime
import platform
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clients.md"

_HEAD = """# Other people's clients

Written by `make test-clients` (`tests/clients/`), {when}, on {cores} CPU cores, Python {python}: the demo model of
`model_store/demo` at TP 2 behind both fronts, and clients as their authors publish them. What failed stays here, with
the reason. They are too heavy for the normal suite, whose contract of both fronts is `tests/helpers/contract.py`.

TorchServe's base URL is `http://127.0.0.1:PORT/predictions/llama/1.0` (with `/v1` for OpenAI's clients; as it is, but
without `http://`, for `tritonclient`); it is served without keys, and ignores the one that clients insist on sending.

| client | version | front | what was done | result | s |
"""
_LINE = "|---|---|---|---|---|---|\n"
_TAIL = """
| not run | why |
|---|---|
| `vllm bench serve` | needs vLLM, and that a CUDA build of PyTorch |
| the chat page on TorchServe | only `tpserve serve` has it |

Schemathesis runs all of its checks, under `tests/clients/schemathesis.toml`: a body that obeys the schema may be
answered 400 or 413, and one that does not 413, too, for a schema cannot say how the last message's role, the
vocabulary, the context's length and the limit on bytes bear on it. What it finds on TorchServe is TorchServe's own:
Netty's 413 has neither body nor content type, and handlers are not told a request's method, so that TRACE is answered
as POST is.

GuideLLM's figures are of a busy two-core machine: that it measures is shown, not how fast we are.
"""


@dataclasses.dataclass(frozen=True)
class Told:
    """What one client made of one front.

    Attributes:
        done, failed: its steps; a failed one says why.
        seconds: the whole process, its start included.
    """

    client: str
    version: str
    front: str
    done: Sequence[str]
    failed: Sequence[str]
    seconds: float

    @classmethod
    def of(cls, script: str, front: str, output: str, trouble: str | None, seconds: float) -> Told:
        """Reads what a client's script printed.

        Args:
            script: taken for the name if it came to nothing.
            front: where it was pointed at.
            output: of the script.
            trouble: how it ended, if not by itself.
            seconds: that it took.
        """
        lines: dict[str, list[str]] = {"client": [], "done": [], "failed": []}
        for line in output.splitlines():
            kind, _, text = line.partition(" ")
            lines.get(kind, []).append(text)
        name, _, version = (lines["client"] or [f"{script} ?"])[0].rpartition(" ")
        return cls(name, version, front, lines["done"], lines["failed"] + ([trouble] if trouble else []), seconds)

    @property
    def row(self) -> str:
        """Of the table."""
        result = "passes" if not self.failed else "**fails**: " + "; ".join(self.failed)
        cells = [
            self.client,
            self.version,
            self.front,
            "; ".join(self.done) or "nothing",
            result,
            f"{self.seconds:.0f}",
        ]
        return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def write(told: Sequence[Told], cores: int, keep: bool) -> None:
    """Replaces the page.

    Args:
        told: the new rows.
        cores: of this machine.
        keep: rows that others told before stay.
    """
    before = PAGE.read_text(encoding="utf-8").partition(_LINE)[2].partition("\n\n")[0] if keep and PAGE.exists() else ""
    rows = {_place(row): row for row in before.splitlines()} | {_place(one.row): one.row for one in told}
    when = datetime.datetime.now(datetime.UTC).date().isoformat()
    head = _HEAD.format(when=when, cores=cores, python=platform.python_version())
    ordered = sorted(rows.items(), key=lambda item: item[0])
    PAGE.write_text(head + _LINE + "".join(f"{row}\n" for _, row in ordered) + _TAIL, encoding="utf-8")


def _place(row: str) -> tuple[str, str]:
    """Client and front of a row."""
    cells = row.split("|")
    return cells[1].strip(), cells[3].strip()

"""llguidance against xgrammar: `python -m tpserve.bench.guided [--tokenizer FILE]`.

Each library runs in a fresh process on the same vocabulary, grammars and answers; one that is not installed is left
out, by name. llguidance runs through `engine/guided.py`, our own work included; xgrammar bare. Figures a library:

- import, start: time and growth of resident memory of the import, and of taking in the vocabulary;
- a grammar: time to compile it and compute the first mask; masks over an answer (median, 99th percentile, worst; each
  with the advance before it); a fork; whether a rollback of the whole answer restores the first mask; memory after it;
- broken: what the library itself, with its defaults, makes of grammars that are no grammars, or bombs: each in a
  process of its own, because some end it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fire

from tpserve.bench.record import write_result

LIBRARIES = ("llguidance", "xgrammar")
DEMO = Path(__file__).resolve().parents[1] / "model_store" / "demo" / "tokenizer.model"
_TEXT = {"type": "string"}
_PERSON = {
    "type": "object",
    "properties": {"name": _TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_ORDER = {
    "$defs": {"person": _PERSON},
    "type": "object",
    "properties": {
        "buyer": {"$ref": "#/$defs/person"},
        "status": {"enum": ["new", "paid", "sent"]},
        "lines": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"sku": _TEXT, "price": {"type": "number"}, "gift": {"type": ["boolean", "null"]}},
                "required": ["sku", "price"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["buyer", "lines"],
    "additionalProperties": False,
}
_WIDE = {
    "type": "object",
    "properties": {f"field_{i}": {"anyOf": [_TEXT, {"type": "integer"}, _PERSON]} for i in range(200)},
    "additionalProperties": False,
}
_LONG = r"It was a bright cold day in April, and the clocks were striking thirteen. \u000a \" " * 8
_LINE = '{"sku": "A-17 blue", "price": 12.5, "gift": null}'
_LINES = f'"status": "paid", "lines": [{", ".join([_LINE] * 20)}]'
_STAMP = r"(\d{4}-\d{2}-\d{2}T\d{2}:\d{2} [\w.]+@[\w.]+\.(com|org)\n)+"
# name → (kind, grammar, an answer)
GRAMMARS = {
    "simple schema": ("json", json.dumps(_PERSON), f'{{"name": "{_LONG}", "age": 42}}'),
    "nested schema": ("json", json.dumps(_ORDER), f'{{"buyer": {{"name": "Ada", "age": 36}}, {_LINES}}}'),
    "200 optional fields": ("json", json.dumps(_WIDE), '{"field_7": "x", "field_150": {"name": "Eve", "age": 5}}'),
    "regex": ("regex", _STAMP, "2024-02-29T23:59 ada@example.org\n" * 12),
    "regex bomb": ("regex", "(.*a.{20}.*b.{20}|.*c.{30}){3}", "abc xyz " * 4),
}
BROKEN = {
    "unknown type": ("json", '{"type": "text"}'),
    "endless reference": ("json", '{"$ref": "#"}'),
    "10,000 levels of schema": ("json", '{"items":' * 10_000 + "{}" + "}" * 10_000),
    "multipleOf 1000003": ("json", '{"type": "integer", "multipleOf": 1000003}'),
    "unsupported keyword (not)": ("json", '{"not": {"type": "string"}}'),
    "open group": ("regex", "(a"),
    "10,000 groups": ("regex", "(" * 10_000 + "a" + ")" * 10_000),
    "lookahead": ("regex", "(?=a)b"),
    "((a{1000}){1000}){1000}": ("regex", "((a{1000}){1000}){1000}"),
}
_BROKEN_TIMEOUT_S = 20


def main(tokenizer: str = str(DEMO)) -> None:
    """Measures every library that is installed.

    Args:
        tokenizer: a SentencePiece model file.
    """
    figures: dict[str, dict[str, Any]] = {}
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed: left out")
            continue
        for row, value in json.loads(_child(library, tokenizer).stdout).items():
            figures.setdefault(row, {})[library] = value
        for name in BROKEN:
            figures.setdefault(name, {})[library] = _broken(library, tokenizer, name)
    write_result("guided", f"python -m tpserve.bench.guided --tokenizer {tokenizer}", figures)


def _child(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tpserve.bench.guided_library", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


def _broken(library: str, tokenizer: str, name: str) -> str:
    command = [sys.executable, "-m", "tpserve.bench.guided_library", library, tokenizer, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BROKEN_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no end after {_BROKEN_TIMEOUT_S} s"
    return done.stdout.strip() if done.returncode == 0 else f"ends the process with status {done.returncode}"


if __name__ == "__main__":
    fire.Fire(main)

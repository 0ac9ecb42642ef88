"""One library's part of `bench/guided.py`: `python -m tpserve.bench.guided_library LIBRARY TOKENIZER [BROKEN]`."""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tpserve.bench.guided import BROKEN, GRAMMARS
from tpserve.engine.text.load import load_tokenizer
from tpserve.engine.text.tokenizer import PieceKind, Tokenizer

Mask = NDArray[np.int32]


class Library(Protocol):
    """What the measurement asks of a library; a matcher is the library's own object."""

    def compile(self, kind: str, grammar: str) -> Any:
        """A matcher at the start of an answer."""

    def mask(self, matcher: Any, words: Mask) -> None:
        """Fills [ceil(V/32)] words."""

    def advance(self, matcher: Any, token_id: int) -> bool:
        """Takes a token."""

    def compile_bare(self, kind: str, grammar: str) -> str:
        """The library's error, or "accepted", after the first mask."""


class Llguidance:
    """Through our own `Grammars`; a new one for each grammar, so that nothing comes from its cache."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tpserve.engine.guided import Grammars

        self._grammars = Grammars(tokenizer, tokenizer.vocab_size, cached=0)

    def compile(self, kind: str, grammar: str) -> Any:
        from tpserve.engine.sampling_params import Guided

        return self._grammars.matcher(Guided(kind, grammar))  # type: ignore[arg-type]

    def mask(self, matcher: Any, words: Mask) -> None:
        matcher.fill_mask(words)

    def advance(self, matcher: Any, token_id: int) -> bool:
        return bool(matcher.advance(token_id))

    def compile_bare(self, kind: str, grammar: str) -> str:
        from llguidance import LLMatcher, regex_to_lark

        body = f"%json {grammar}" if kind == "json" else f"/{regex_to_lark(grammar)}/"
        lark = f'%llguidance {{"no_forcing": true}}\nstart: {body}'
        matcher = LLMatcher(self._grammars.vocabulary.library, lark, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        return f"error: {matcher.get_error()}" if matcher.is_error() else "accepted"


class Xgrammar:
    """As its documentation says, on one thread and without its cache."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        xgrammar: Any = import_module("xgrammar")  # no dependency of this package
        spelled = [text.encode() if kind is PieceKind.TEXT else data for kind, text, data in tokenizer.pieces]
        info = xgrammar.TokenizerInfo(
            spelled, xgrammar.VocabType.RAW, vocab_size=tokenizer.vocab_size, stop_token_ids=[tokenizer.eos_id]
        )
        self._xgrammar = xgrammar
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, kind: str, grammar: str) -> Any:
        compiler = self._compiler
        compiled = compiler.compile_json_schema(grammar) if kind == "json" else compiler.compile_regex(grammar)
        return self._xgrammar.GrammarMatcher(compiled)

    def mask(self, matcher: Any, words: Mask) -> None:
        matcher.fill_next_token_bitmask(words[None])

    def advance(self, matcher: Any, token_id: int) -> bool:
        return bool(matcher.accept_token(token_id))

    def compile_bare(self, kind: str, grammar: str) -> str:
        self.compile(kind, grammar)
        return "accepted"


def main(name: str, tokenizer_file: str, broken: str = "") -> None:
    """Prints the figures of one library as JSON, or what it makes of one broken grammar."""
    tokenizer = load_tokenizer(Path(tokenizer_file))
    before_mib, started = _rss_mib(), time.perf_counter()
    __import__("tpserve.engine.guided" if name == "llguidance" else name)
    figures: dict[str, Any] = {
        "version": version(name),
        "import_ms": round((time.perf_counter() - started) * 1e3, 1),
        "import_mib": round(_rss_mib() - before_mib, 1),
        "import_needs_torch": "torch" in sys.modules,
    }
    before_mib, started = _rss_mib(), time.perf_counter()
    library: Library = Llguidance(tokenizer) if name == "llguidance" else Xgrammar(tokenizer)
    figures["start_ms"] = round((time.perf_counter() - started) * 1e3, 1)
    figures["start_mib"] = round(_rss_mib() - before_mib, 1)
    if broken:
        print(_outcome(library, *BROKEN[broken]))
        return
    for title, grammar in GRAMMARS.items():
        measured = _measure(library, tokenizer, *grammar)
        figures |= {f"{title}: {key}": value for key, value in measured.items()}
    print(json.dumps(figures))


def _measure(library: Library, tokenizer: Tokenizer, kind: str, grammar: str, answer: str) -> dict[str, Any]:
    words = np.zeros((tokenizer.vocab_size + 31) // 32, dtype=np.int32)
    before_mib, started = _rss_mib(), time.perf_counter()
    matcher = library.compile(kind, grammar)
    library.mask(matcher, words)
    compiled_ms = (time.perf_counter() - started) * 1e3
    first, seconds = words.copy(), []
    ids = _spell(tokenizer, answer)
    for token_id in ids:
        started = time.perf_counter()
        if not library.advance(matcher, token_id):
            break  # a limit ended the answer
        library.mask(matcher, words)
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    matcher.fork()
    fork_us = (time.perf_counter() - started) * 1e6
    matcher.rollback(len(seconds))
    library.mask(matcher, words)
    p50, p99, worst = np.percentile(np.array(seconds) * 1e6, [50, 99, 100]).round(1).tolist()
    return {
        "compile_ms": round(compiled_ms, 2),
        "tokens": f"{len(seconds)} of {len(ids)}",
        "mask_p50_us": p50,
        "mask_p99_us": p99,
        "mask_worst_us": worst,
        "fork_us": round(fork_us, 1),
        "rollback_restores": bool((words == first).all()),
        "memory_mib": round(_rss_mib() - before_mib, 1),
    }


def _outcome(library: Library, kind: str, grammar: str) -> str:
    started = time.perf_counter()
    try:
        said = library.compile_bare(kind, grammar)
    except Exception as e:  # noqa: BLE001  # which exception it is, is the finding
        said = f"{type(e).__name__}: {e}"
    said = " ".join(said.split())
    return f"{(time.perf_counter() - started) * 1e3:.0f} ms, {said[:120]}"


def _spell(tokenizer: Tokenizer, text: str) -> list[int]:
    """Longest pieces first; both libraries get the same ids, whatever they think of a first piece's space."""
    pieces = {piece: i for i, (kind, piece, _) in enumerate(tokenizer.pieces) if kind is PieceKind.TEXT}
    bytes_of = {data[0]: i for i, (kind, _, data) in enumerate(tokenizer.pieces) if kind is PieceKind.BYTES}
    ids: list[int] = []
    while text:
        length = next((n for n in range(tokenizer.max_piece_chars, 0, -1) if text[:n] in pieces), 0)
        ids += [pieces[text[:length]]] if length else [bytes_of[b] for b in text[0].encode()]
        text = text[length or 1 :]
    return ids


def _rss_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


if __name__ == "__main__":
    main(*sys.argv[1:])

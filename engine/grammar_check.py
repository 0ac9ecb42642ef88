"""Looks at users' grammars in a process of its own, with little time and memory: some make the grammar library take all
that there is, and abort.

What passed here is compiled again where it is used, with the same limits on operations, so in the same time and memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import IO

import msgspec

from tpserve.engine.errors import EngineError, RequestError
from tpserve.engine.guided import Grammars
from tpserve.engine.sampling_params import Guided
from tpserve.engine.text.load import load_tokenizer

# The largest schema that we know of, with 2,000 properties, takes 0.3 s and 20 MB.
MAX_CPU_S = 2.0
MAX_BYTES = 512 << 20
_MAX_WALL_S = 15.0  # on a machine that has other things to do
_MAX_START_S = 60.0
_MAX_VERDICTS = 1024
_LENGTH_BYTES = 4
_READY = ""


class UnknownGrammarError(Exception):
    """Nobody has looked at this grammar yet, and the caller has no time to wait for that."""


class GrammarChecker:
    """Asks the process about grammars. Thread-safe; the process starts with the first question.

    Args:
        tokenizer: the model's file.
        vocab_size: of the model's logits.
    """

    def __init__(self, tokenizer: Path, vocab_size: int) -> None:
        self._command = [sys.executable, "-m", "tpserve.engine.grammar_check", str(tokenizer), str(vocab_size)]
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()  # None: it can be used
        self._process: subprocess.Popen[bytes] | None = None
        self._asking = threading.Lock()  # whoever holds it talks to the process
        self._lock = threading.Lock()

    def recall(self, guided: Guided) -> None:
        """As `check`, of grammars that were looked at before.

        Raises:
            UnknownGrammarError: this one was not.
        """
        with self._lock:
            key = _key(guided)
            if key not in self._verdicts:
                raise UnknownGrammarError
            self._verdicts.move_to_end(key)
            verdict = self._verdicts[key]
        _raise(guided, verdict)

    def check(self, guided: Guided) -> None:
        """Returns if the grammar can be used; takes up to `_MAX_WALL_S`, and waits for others that are looked at.

        Raises:
            RequestError: it cannot; with field "guided_json", "guided_regex" or "guided_choice" and the reason.
            EngineError: the process does not start.
        """
        with contextlib.suppress(UnknownGrammarError):
            return self.recall(guided)
        with self._asking:
            with contextlib.suppress(UnknownGrammarError):  # another request's was the same
                return self.recall(guided)
            verdict = self._ask(guided)
            with self._lock:
                self._verdicts[_key(guided)] = verdict
                while len(self._verdicts) > _MAX_VERDICTS:
                    self._verdicts.popitem(last=False)
        return _raise(guided, verdict)

    def close(self) -> None:
        """Ends the process."""
        with self._asking:
            self._end()

    def _ask(self, guided: Guided) -> str | None:
        fresh = self._process is None
        verdict = self._try(guided)
        if verdict == _too_complex(guided) and not fresh:  # the memory may have been others'
            verdict = self._try(guided)
        return verdict

    def _try(self, guided: Guided) -> str | None:
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            _write(process.stdin, msgspec.msgpack.encode(guided))
            return msgspec.msgpack.decode(self._read(process, _MAX_WALL_S), type=str | None)
        except (OSError, EOFError):
            self._end()
            return _too_complex(guided)

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        try:
            # Its errors are told by its end; a library that aborts would write pages.
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
            self._process = process
            self._read(process, _MAX_START_S)
        except (OSError, EOFError) as e:
            self._end()
            raise EngineError(f"the process that looks at grammars does not start: {e}") from None
        return process

    def _read(self, process: subprocess.Popen[bytes], timeout_s: float) -> bytes:
        assert process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        received = b""
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while len(received) < _LENGTH_BYTES or len(received) < _LENGTH_BYTES + _length(received):
            if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
                raise EOFError("it takes too long")
            more = os.read(process.stdout.fileno(), 1 << 16)
            if not more:
                raise EOFError("it has ended")
            received += more
        return received[_LENGTH_BYTES:]

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what could not be written
                pipe.close()
        self._process = None


def _raise(guided: Guided, verdict: str | None) -> None:
    if verdict is not None:
        raise RequestError(verdict, field=f"guided_{guided.kind}")


def _too_complex(guided: Guided) -> str:
    return (
        f"guided_{guided.kind} cannot be used: it is too complex: {MAX_CPU_S:g} s and {MAX_BYTES >> 20} MiB were not "
        "enough to look at it"
    )


def _key(guided: Guided) -> bytes:
    text = f"{guided.kind} {guided.grammar}"
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _length(received: bytes) -> int:
    return int.from_bytes(received[:_LENGTH_BYTES], "big")


def _write(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(len(message).to_bytes(_LENGTH_BYTES, "big") + message)
    pipe.flush()


# What follows runs in the process.


def _main(tokenizer: str, vocab_size: str) -> None:
    grammars = Grammars(load_tokenizer(Path(tokenizer), encodes=False), int(vocab_size), cached=1)
    if sys.platform.startswith("linux"):
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for whoever started us
    asked, told = sys.stdin.buffer, sys.stdout.buffer
    _write(told, msgspec.msgpack.encode(_READY))
    while length := asked.read(_LENGTH_BYTES):  # its end is the front's
        guided = msgspec.msgpack.decode(asked.read(_length(length)), type=Guided)
        # Nobody handles SIGPROF: wherever the library is, the kernel ends us.
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
        verdict: str | None = None
        try:
            grammars.check(guided)
        except RequestError as e:
            verdict = str(e)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(told, msgspec.msgpack.encode(verdict))


if __name__ == "__main__":
    _main(*sys.argv[1:])

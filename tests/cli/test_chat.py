"""`tpserve chat`: its commands, its history, Ctrl-C, and the same answers by a server and by an engine of its own."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import ENV, TPSERVE
from tpserve.bench.serve_server import running
from tpserve.cli.chat import Chat, converse
from tpserve.cli.chat_client import Figures, LocalChat, Message, ServerChat
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError, EngineError, RequestError
from tpserve.engine.session import Session


class Parrot:
    """Says what it was told, in pieces; `broken` is raised after the first."""

    name = "parrot"

    def __init__(self) -> None:
        self.asked: list[tuple[list[Message], dict[str, Any]]] = []
        self.broken: BaseException | None = None
        self.closed = 0

    def answer(self, messages: list[Message], sampling: dict[str, Any], figures: Figures) -> Generator[str, None, None]:
        self.asked.append((list(messages), dict(sampling)))
        figures.tokens, figures.finish_reason = 2, "stop"
        try:
            yield " so: "
            if self.broken is not None:
                raise self.broken
            yield messages[-1]["content"]
        finally:
            self.closed += 1


def test_history_and_commands(tmp_path: Path) -> None:
    said: list[str] = []
    parrot = Parrot()
    chat = Chat(parrot, {"temperature": 0.5}, "Be kind.", said.append)
    for line in ("hello", "/set top_k 5", "/unset temperature", "/system Be short.", "again", ""):
        chat.take(line)
    system = {"role": "system", "content": "Be kind."}
    first = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "so: hello"}]
    assert parrot.asked[0] == ([system, first[0]], {"temperature": 0.5})
    then = [{"role": "system", "content": "Be short."}, *first, {"role": "user", "content": "again"}]
    assert parrot.asked[1] == (then, {"top_k": 5})
    chat.take(f"/save {tmp_path / 'c.json'}")
    assert json.loads((tmp_path / "c.json").read_text()) == [*then, {"role": "assistant", "content": "so: again"}]
    chat.take("/reset")
    chat.take("/system")
    chat.take("new")
    assert parrot.asked[2] == ([{"role": "user", "content": "new"}], {"top_k": 5})
    assert "[2 tokens, stop]\n" in said
    said.clear()
    for line in ("/set temprature 1", "/set temperature -1", "/set temperature hot", "/unset temperature", "/no",
                 "/save /nowhere/at/all", "/save"):  # fmt: skip
        chat.take(line)
    assert len(said) == 7
    assert all(line.startswith("error: ") for line in said)
    assert chat.sampling == {"top_k": 5}


def test_what_fails_or_is_stopped() -> None:
    said: list[str] = []
    parrot = Parrot()
    chat = Chat(parrot, {}, say=said.append, stats=False)
    parrot.broken = KeyboardInterrupt()
    chat.take("one")  # what was said stays
    assert [message["content"] for message in chat.messages] == ["one", "so: "]
    parrot.broken = RequestError("messages has 99 tokens")
    chat.take("two")  # was never asked
    assert len(chat.messages) == 2
    assert said[-1] == "error: messages has 99 tokens\n"
    parrot.broken = EngineError("it died")
    with pytest.raises(EngineError):
        chat.take("three")
    assert len(chat.messages) == 2
    assert parrot.closed == 3


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C at the prompt forgets a line and goes on; a backslash joins two; the end of the input is the end."""
    parrot = Parrot()
    left: list[str | BaseException] = ["one \\", "two", "lost \\", KeyboardInterrupt(), "three", EOFError()]

    def read(prompt: str) -> str:
        line = left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    converse(Chat(parrot, {}), read)
    assert [messages[-1]["content"] for messages, _ in parrot.asked] == ["one \ntwo", "three"]
    assert "Ctrl-D ends" in capsys.readouterr().out
    left = ["/exit", "never"]
    converse(Chat(parrot, {}), read)
    assert left == ["never"]


def test_a_server_answers_as_an_engine_of_ones_own(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same template, with the same words; a stream that is given up is nobody's any more."""
    messages: list[Message] = [
        {"role": "system", "content": "You tell fairy tales."},
        {"role": "user", "content": "Tell me a story about a king."},
    ]
    sampling = {"temperature": 0, "max_new_tokens": 30}
    answers = []
    serve = f"OMP_NUM_THREADS=1 {sys.executable} -m tpserve.cli.main serve --checkpoint {demo} --port {{port}}"
    with running(f"{serve} --device cpu --standby False --api_key k", "k") as url:
        client = ServerChat(f"{url}/v1", "k")
        figures = Figures(time.perf_counter())
        answers.append("".join(client.answer(messages, sampling, figures)))
        assert (figures.tokens, figures.finish_reason) == (30, "length")
        assert figures.sent_s < figures.first_s < figures.last_s
        stopped = client.answer(messages, sampling | {"max_new_tokens": 1000, "ignore_eos": True}, figures)
        next(stopped)
        stopped.close()
        with pytest.raises(RequestError, match=r"400: .*temperature"):
            list(client.answer(messages, {"temperature": -1}, figures))
        with pytest.raises(RequestError, match="401"):
            ServerChat(url)
    with pytest.raises(EngineError, match="does not answer"):
        list(client.answer(messages, sampling, figures))
    with pytest.raises(ConfigError, match="is no URL"):
        ServerChat("127.0.0.1:80")
    monkeypatch.delenv("TPSERVE_LOG_LEVEL", raising=False)
    config = EngineConfig(checkpoint_dir=str(demo), device="cpu", standby=False, max_seq_len=512)
    with Session(config, progress=False) as session:
        local = LocalChat(session)
        figures = Figures(time.perf_counter())
        answers.append("".join(local.answer(messages, sampling, figures)))
        assert (figures.tokens, figures.finish_reason) == (30, "length")
        stopped = local.answer(messages, sampling | {"max_new_tokens": 400, "ignore_eos": True}, figures)
        next(stopped)
        stopped.close()
        deadline_s = time.monotonic() + 10
        while session.client.status().ranks[0].num_blocks_in_use and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert session.client.status().ranks[0].num_blocks_in_use == 0
        with pytest.raises(RequestError, match="the context holds 512"):
            list(local.answer([{"role": "user", "content": "king " * 600}], sampling, figures))
    assert "TPSERVE_LOG_LEVEL" not in os.environ
    assert answers[0].strip() == answers[1].strip() != ""


def test_ctrl_c_stops_the_answer_and_not_the_program(demo: Path, tmp_path: Path) -> None:
    """As a terminal sends it: to every process of the foreground group."""
    command = [*TPSERVE, "chat", "--checkpoint", str(demo), "--tp", "2", "--device", "cpu", "--ignore_eos"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=ENV,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        try:
            assert "chat template: llama2" in process.stdout.readline()
            for _ in range(5):  # an answer may have ended before the signal
                process.stdin.write("/reset\nTell me a story.\n")
                process.stdin.flush()
                begun = process.stdout.read(60)
                os.killpg(process.pid, signal.SIGINT)
                story = begun
                while not story.endswith("]\n"):
                    story += process.stdout.read(1)
                if story.endswith("stopped by you]\n"):
                    break
            process.stdin.write(f"/set max_new_tokens 5\nGo on.\n/save {tmp_path / 'c.json'}\n/exit\n")
            process.stdin.flush()
            rest = process.stdout.read()
        finally:
            if process.poll() is None:
                process.terminate()
        assert process.wait(30) == 0
    assert story.endswith("stopped by you]\n")
    assert "[5 tokens, " in rest
    messages = json.loads((tmp_path / "c.json").read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[1]["content"].startswith(begun)
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(demo) not in left

"""`tpserve chat`: a chat in the terminal, with its history, commands, and Ctrl-C that stops an answer only."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire

from tpserve.cli.chat_client import ChatClient, Figures, LocalChat, Message, ServerChat

_TEXTS = ("checkpoint", "url", "api_key", "model", "system", "chat_template", "device", "dtype", "quantization",
          "kv_cache_dtype", "stop")  # fmt: skip
HELP = """\
/reset               forget what was said; the system message stays
/system TEXT         the system message from now on; without TEXT there is none
/set NAME VALUE      such as /set temperature 0.5; without them: what is set
/unset NAME          as if it had never been set
/save FILE           the messages as JSON
/help, /exit         this; the end (Ctrl-D, too)
Ctrl-C stops an answer; what was said of it stays. A line that ends with \\ goes on in the next one."""


class Chat:
    """A chat and its commands.

    Args:
        client: answers.
        sampling: fields of every request.
        system: the system message; empty: none.
        say: prints pieces of text, without line breaks of its own.
        stats: show tokens, TTFT and tokens/s after each answer.

    Attributes:
        messages: what was said, without the system message.
        ended: /exit was said.
    """

    def __init__(
        self,
        client: ChatClient,
        sampling: dict[str, Any],
        system: str = "",
        say: Callable[[str], object] = lambda text: print(text, end="", flush=True),
        stats: bool = True,
    ) -> None:
        self._client, self._say, self._stats = client, say, stats
        self.sampling, self.system = dict(sampling), system
        self.messages: list[Message] = []
        self.ended = False

    @property
    def whole(self) -> list[Message]:
        """The messages as they are sent."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def take(self, line: str) -> None:
        """A command, or something to be answered. Prints what goes wrong; the chat goes on.

        Raises:
            EngineError: nothing will be answered any more.
        """
        from tpserve.engine.errors import ConfigError, RequestError

        try:
            if line.startswith("/"):
                self._command(line)
            elif line.strip():
                self._answer(line)
        except (RequestError, ConfigError) as e:
            self._say(f"error: {e}\n")

    def _answer(self, text: str) -> None:
        from tpserve.engine.errors import TpserveError

        self.messages.append({"role": "user", "content": text})
        figures = Figures(time.perf_counter())
        said = ""
        pieces = self._client.answer(self.whole, self.sampling, figures)
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    # As templates do; some models begin with a space.
                    piece = piece if said else piece.lstrip(" ")
                    said += piece
                    self._say(piece)
        except KeyboardInterrupt:
            figures.finish_reason = ""
        except TpserveError:
            self.messages.pop()
            raise
        self._say("\n")
        if said:
            self.messages.append({"role": "assistant", "content": said})
        else:  # two questions in a row are more than some templates take
            self.messages.pop()
        if self._stats:
            self._say(f"[{figures.line()}]\n")

    def _command(self, line: str) -> None:
        from tpserve.engine.errors import RequestError

        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/reset":
                self.messages.clear()
            case "/system":
                self.system = rest
            case "/set":
                self._set(rest)
            case "/unset":
                if rest not in self.sampling:
                    raise RequestError(f"{rest!r} is not set")
                del self.sampling[rest]
            case "/save":
                self._save(rest)
            case "/help":
                self._say(HELP + "\n")
            case "/exit" | "/quit":
                self.ended = True
            case _:
                raise RequestError(f"unknown command {name}; /help shows what there is")

    def _set(self, rest: str) -> None:
        from tpserve.engine.fields import unknown_field
        from tpserve.engine.sampling_fields import ALIASES, SAMPLING_FIELDS, sampling_params
        from tpserve.engine.sampling_params import SamplingParams

        if not rest:
            self._say(json.dumps(self.sampling) + "\n")
            return
        name, _, text = rest.partition(" ")
        if name not in SAMPLING_FIELDS and name not in ALIASES:
            raise unknown_field(name, SAMPLING_FIELDS)
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        changed = self.sampling | {name: value}
        if name != "bad_words":  # words are encoded by whoever answers
            sampling_params(changed, SamplingParams())
        self.sampling = changed

    def _save(self, name: str) -> None:
        from tpserve.engine.errors import RequestError

        if not name:
            raise RequestError("/save wants a file's name")
        try:
            Path(name).write_text(json.dumps(self.whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as e:
            raise RequestError(f"{name}: {e.strerror}") from None
        self._say(f"{len(self.whole)} messages in {name}\n")


def converse(chat: Chat, read: Callable[[str], str]) -> None:
    """Until the end of the input, or /exit.

    Args:
        chat: what takes the lines.
        read: from a prompt to a line, as `input`.
    """
    line = ""
    while not chat.ended:
        try:
            line += read("... " if line else "> ")
            if line.endswith("\\"):
                line = line[:-1] + "\n"
                continue
            chat.take(line)
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D ends)")
        except EOFError:
            print()
            return
        line = ""


@fire.decorators.SetParseFns(**dict.fromkeys(_TEXTS, str))  # type: ignore[untyped-decorator]
def chat(
    checkpoint: str = "",
    tp: int = 1,
    url: str = "",
    api_key: str = "",
    model: str = "",
    system: str = "",
    chat_template: str = "",
    stats: bool = True,
    **options: Any,
) -> None:
    """Chats in the terminal with a checkpoint, or with a server that runs; /help there shows the commands.

    Args:
        checkpoint: a checkpoint of any form, for which an engine is started.
        tp: its tensor-parallel size.
        url: or a server of OpenAI's protocol, such as http://127.0.0.1:8080.
        api_key: that the server asks for.
        model: as the server calls it; default: the first that it lists.
        system: the system message.
        chat_template: llama2, llama3 or a jinja2 file, instead of the checkpoint's.
        stats: show tokens, time to first token and tokens/s after each answer.
        options: sampling fields (temperature, top_k, top_p, repetition_penalty, seed, max_new_tokens, …) and keys of
            the engine's configuration (max_seq_len, dtype, device, …).
    """
    from tpserve.engine.config import EngineConfig
    from tpserve.engine.errors import ConfigError
    from tpserve.engine.options import split_options
    from tpserve.engine.session import Session

    if bool(checkpoint) == bool(url):
        raise ConfigError("give either checkpoint or url")
    engine, sampling = split_options(options)
    with contextlib.ExitStack() as stack:
        if url:
            if engine:
                raise ConfigError(f"{next(iter(engine))} is the server's affair: it was started with its own")
            client: ChatClient = ServerChat(url, api_key, model)
        else:
            settings = {"checkpoint_dir": checkpoint, "tensor_parallel_size": tp, "standby": False, **engine}
            config = EngineConfig.from_dict(settings)
            # OpenAI's defaults, as in a server: the same question is then the same by both ways.
            defaults = {"temperature": 1.0, "max_new_tokens": config.max_seq_len}
            client = LocalChat(stack.enter_context(Session(config, defaults, chat_template)))
        print(f"{client.name}; /help, Ctrl-D ends")
        converse(Chat(client, sampling, system, stats=stats), _read)


def _read(prompt: str) -> str:
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and come back
    return input(prompt)

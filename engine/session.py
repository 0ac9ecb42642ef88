"""One user's own engine: a rank group that is started, asked and ended by a command. Free of torch.

`tpserve run`, `tpserve chat` and `tpserve eval` ask it. Prompts, templates, sampling fields and text are read and made
by what serves them, too; only HTTP is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import threading
import time
import types
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tpserve.engine.client import EngineClient
from tpserve.engine.completion import Completion
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError
from tpserve.engine.process import LOG_LEVEL
from tpserve.engine.protocol import Ready, RequestOutput
from tpserve.engine.requests import GenerateRequest, RequestReader
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.text.chat_template import LLAMA2, LLAMA3, ChatTemplate, default_template
from tpserve.engine.text.load import checkpoint_tokenizer
from tpserve.engine.text.tokenizer import Tokenizer, TokenizerError

_REDRAW_S = 0.2


@dataclasses.dataclass
class Timing:
    """When one request's tokens came; times are seconds of `time.perf_counter`.

    Attributes:
        sent_s: when it was submitted.
        first_s, last_s: when its first tokens came, and its last; 0: none have.
        tokens: so far, over all answers, those that are not returned (`best_of`) and those after a stop string
            included.
    """

    sent_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    tokens: int = 0

    @property
    def ttft_s(self) -> float:
        """Time to first token; of an answer without tokens, the whole time."""
        return self.first_s - self.sent_s

    @property
    def total_s(self) -> float:
        """From the submission to the last token."""
        return self.last_s - self.sent_s

    @property
    def tokens_per_s(self) -> float:
        """After the first token; of beams, which come all at once, over the whole time."""
        if self.last_s > self.first_s and self.tokens > 1:
            return (self.tokens - 1) / (self.last_s - self.first_s)
        return self.tokens / self.total_s if self.total_s > 0 else 0.0

    def heard(self, now_s: float, output: RequestOutput) -> None:
        """Takes note of an output."""
        self.first_s = self.first_s or now_s
        self.last_s = now_s
        self.tokens += len(output.token_ids)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that runs, or has ended.

    Attributes:
        index: which of those that were asked together.
        completion: its answers.
        timing: when they came.
    """

    index: int
    request: GenerateRequest
    completion: Completion
    timing: Timing


class Session:
    """See the module's text. A context manager: the group starts with the block and ends with it.

    Args:
        config: of the group.
        sampling: fields for requests that do not say.
        chat_template: llama2, llama3 or a jinja2 file; empty: the checkpoint's own, as a server takes it.
        progress: show on stderr that it is starting.

    Attributes:
        tokenizer: the checkpoint's; None: it has none.
        chat_template: likewise, for the context that there is.
        client: of the engine.
        defaults: for requests that do not say.

    Raises:
        ConfigError, CheckpointError, RequestError: it cannot be served so.
    """

    def __init__(
        self,
        config: EngineConfig,
        sampling: Mapping[str, Any] = types.MappingProxyType({}),
        chat_template: str = "",
        progress: bool = True,
    ) -> None:
        self.client = EngineClient(config)
        try:
            self.tokenizer: Tokenizer | None = checkpoint_tokenizer(Path(config.checkpoint_dir))
        except TokenizerError as e:
            raise ConfigError(str(e)) from None
        template = _template(chat_template, self.tokenizer)
        self.chat_template = None if template is None else template.within(config.max_seq_len)
        self._reader = RequestReader(
            self.tokenizer, self.client.checkpoint.args.vocab_size, config.max_seq_len, chat_template=self.chat_template
        )
        self.defaults = self._reader.params(sampling, SamplingParams())
        self._progress = progress
        self._asked = 0

    @property
    def info(self) -> Ready:
        """What the group said when it was ready."""
        return self.client.info

    def __enter__(self) -> Session:
        self._quietened = LOG_LEVEL not in os.environ
        os.environ.setdefault(LOG_LEVEL, "WARNING")  # the terminal is for answers
        name = Path(self.client.config.checkpoint_dir).name
        with _waiting(f"loading {name}, TP {self.client.config.tensor_parallel_size}", self._progress):
            try:
                self.client.start()
            except BaseException:  # such as Ctrl-C, while a large checkpoint loads
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        if self._quietened:
            os.environ.pop(LOG_LEVEL, None)

    def read(self, given: Mapping[str, Any]) -> GenerateRequest:
        """A request of any of `requests.KNOWN_FIELDS`.

        Raises:
            RequestError: names the field.
        """
        return self._reader.read(given, self.defaults)

    def read_chat(self, messages: list[dict[str, Any]], given: Mapping[str, Any]) -> GenerateRequest:
        """A chat up to where the assistant is to go on, through the chat template; see `ChatTemplate.encode`.

        Raises:
            RequestError: the template cannot take the messages, the context cannot hold them, or a field is wrong.
            ConfigError: the checkpoint has no tokenizer.
        """
        if self.chat_template is None:
            raise ConfigError("this model has no tokenizer: there is nothing to chat with")
        params = self._reader.params(given, self.defaults)
        return GenerateRequest(self.chat_template.encode(messages), params)

    def ask(self, requests: Iterable[GenerateRequest], in_flight: int = 1) -> Generator[Asked, None, None]:
        """Runs requests; yields one whenever it has something new. What is left is cancelled when the iterator ends.

        Args:
            requests: taken when there is place for them.
            in_flight: so many at once.

        Raises:
            RequestError, EngineError: one cannot be served.
        """
        inbox: queue.SimpleQueue[tuple[str, float, RequestOutput]] = queue.SimpleQueue()
        running: dict[str, Asked] = {}
        waiting = enumerate(requests)
        try:
            while True:
                while len(running) < in_flight and (following := next(waiting, None)) is not None:
                    self._submit(*following, running, inbox)
                if not running:
                    return
                name, now_s, output = inbox.get()
                if name not in running:  # a stop string ended it, and the engine has not heard of it yet
                    continue
                asked = running[name]
                asked.timing.heard(now_s, output)
                asked.completion.add(output)
                if asked.completion.finished:
                    del running[name]
                yield asked
        finally:
            for name in running:
                self.client.cancel(name)

    def _submit(
        self,
        index: int,
        request: GenerateRequest,
        running: dict[str, Asked],
        inbox: queue.SimpleQueue[tuple[str, float, RequestOutput]],
    ) -> None:
        self._asked += 1
        name = f"session/{self._asked}"
        completion = Completion(
            request.prompt_token_ids,
            request.params,
            self.tokenizer,
            request.prompt_text,
            lambda choice: self.client.cancel(name, choice),
        )
        running[name] = Asked(index, request, completion, Timing(time.perf_counter()))
        self.client.submit(
            name,
            request.prompt_token_ids,
            completion.params,
            lambda output: inbox.put((name, time.perf_counter(), output)),
            priority=request.priority,
            timeout_s=request.timeout_s,
        )


def progress_bar(total: int, what: str, unit: str = "prompt") -> tqdm[Any]:
    """A bar on stderr, which goes away at its end."""
    return tqdm(total=total, desc=what, unit=unit, leave=False, dynamic_ncols=True)


def _template(setting: str, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    if not setting or tokenizer is None:
        return default_template(tokenizer)
    if setting in (LLAMA2, LLAMA3):
        return ChatTemplate.load(setting, tokenizer)
    if not Path(setting).is_file():
        raise ConfigError(f"chat_template must be {LLAMA2}, {LLAMA3} or a jinja2 file, got {setting!r}")
    return ChatTemplate.load(Path(setting), tokenizer)


@contextlib.contextmanager
def _waiting(what: str, show: bool) -> Iterator[None]:
    """A line on a terminal that says how long it has been; the ranks do not tell how far they are."""
    done = threading.Event()
    with tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=False, disable=None if show else True) as bar:

        def draw() -> None:
            while not done.wait(_REDRAW_S):
                bar.refresh()

        drawing = threading.Thread(target=draw, daemon=True)
        drawing.start()
        try:
            yield
        finally:
            done.set()
            drawing.join()

"""What `tpserve chat` asks: an engine of its own, or a server that runs."""

from __future__ import annotations

import dataclasses
import json
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tpserve.engine.session import Session

Message = dict[str, Any]
_TIMEOUT_S = 600.0  # between two reads: a long prompt takes its time
_ERROR_CHARS = 600
# The engine's names where OpenAI's protocol, or vLLM's extension of it, has others: a server passes over what it does
# not know.
_IN_PROTOCOL = {"max_new_tokens": "max_tokens", "len_penalty": "length_penalty"}


@dataclasses.dataclass
class Figures:
    """Of one answer; times are seconds of `time.perf_counter`.

    Attributes:
        tokens: 0: nobody said.
    """

    sent_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    tokens: int = 0
    finish_reason: str = ""

    def line(self) -> str:
        """For people."""
        said = [f"{self.tokens} tokens"] if self.tokens else []
        if self.first_s:
            said.append(f"TTFT {1e3 * (self.first_s - self.sent_s):.0f} ms")
        if self.tokens > 1 and self.last_s > self.first_s:
            said.append(f"{(self.tokens - 1) / (self.last_s - self.first_s):.1f} tokens/s")
        return ", ".join([*said, self.finish_reason or "stopped by you"])


class ChatClient(Protocol):
    """Answers chats.

    Attributes:
        name: of what is asked, for people.
    """

    name: str

    def answer(self, messages: list[Message], sampling: dict[str, Any], figures: Figures) -> Generator[str, None, None]:
        """The answer, piece by piece; closing the iterator stops it. `figures` is filled on the way.

        Raises:
            TpserveError: there is none, or no more of it.
        """


class LocalChat:
    """An engine of this command's own, with the defaults of OpenAI's protocol, as a server has them.

    Args:
        session: started.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        info = session.info
        self.name = f"{session.client.config.checkpoint_dir}, TP {info.tensor_parallel_size} on {info.device}"
        if session.chat_template is not None:
            self.name += f", chat template: {session.chat_template.name}"

    def answer(self, messages: list[Message], sampling: dict[str, Any], figures: Figures) -> Generator[str, None, None]:
        """See `ChatClient`."""
        from tpserve.engine.errors import EngineError

        request = self._session.read_chat(messages, sampling)
        events = self._session.ask([request])
        try:
            for asked in events:
                figures.first_s, figures.last_s = asked.timing.first_s, asked.timing.last_s
                figures.tokens = asked.completion.usage.completion_tokens
                for delta in asked.completion.take():
                    figures.finish_reason = delta.finish_reason or ""
                    yield delta.text
                if asked.completion.error is not None:
                    raise EngineError(asked.completion.error)
        finally:
            events.close()


class ServerChat:
    """Any server of OpenAI's protocol.

    Args:
        url: such as http://127.0.0.1:8080; with or without /v1.
        api_key: sent as a bearer token.
        model: empty: the first that the server lists.

    Raises:
        ConfigError: it is no URL, or the server does not say what it serves.
    """

    def __init__(self, url: str, api_key: str = "", model: str = "") -> None:
        from tpserve.engine.errors import ConfigError

        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no URL such as http://127.0.0.1:8080")
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        if not model:
            with self._open("models", None) as response:
                listed = response.read()
            try:
                model = json.loads(listed)["data"][0]["id"]
            except (ValueError, KeyError, IndexError, TypeError) as e:
                raise ConfigError(f"{self._base}/models lists no model: {e!r}") from None
        self._model = model
        self.name = f"{model} at {self._base}"

    def answer(self, messages: list[Message], sampling: dict[str, Any], figures: Figures) -> Generator[str, None, None]:
        """See `ChatClient`."""
        from tpserve.engine.sampling_fields import ALIASES

        names = {name: ALIASES.get(name, name) for name in sampling}
        told = {_IN_PROTOCOL.get(names[name], names[name]): value for name, value in sampling.items()}
        body = {"model": self._model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        with self._open("chat/completions", json.dumps(body | told).encode()) as response:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    return
                yield from self._pieces(json.loads(payload), figures)

    def _pieces(self, chunk: dict[str, Any], figures: Figures) -> Generator[str, None, None]:
        from tpserve.engine.errors import EngineError

        if "error" in chunk:
            raise EngineError(_message_of(chunk))
        if chunk.get("usage"):
            figures.tokens = chunk["usage"].get("completion_tokens") or 0
        for choice in chunk.get("choices", []):
            figures.finish_reason = choice.get("finish_reason") or figures.finish_reason
            if piece := (choice.get("delta") or {}).get("content"):
                figures.last_s = time.perf_counter()
                figures.first_s = figures.first_s or figures.last_s
                yield piece

    def _open(self, path: str, body: bytes | None) -> Any:
        from tpserve.engine.errors import EngineError, RequestError

        request = urllib.request.Request(f"{self._base}/{path}", data=body, headers=self._headers)
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as e:
            with e:
                said = e.read().decode(errors="replace")
            try:
                said = _message_of(json.loads(said))
            except ValueError:
                said = said[:_ERROR_CHARS]
            raise RequestError(f"{e.code}: {said}", status=e.code) from None
        except OSError as e:
            raise EngineError(f"{self._base} does not answer: {getattr(e, 'reason', e)}") from None


def _message_of(reply: Any) -> str:
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    return str(error.get("message", error) if isinstance(error, dict) else error)[:_ERROR_CHARS]

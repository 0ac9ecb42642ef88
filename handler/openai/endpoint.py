"""What the endpoints of this protocol have in common."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

from tpserve.engine.grammar_check import UnknownGrammarError
from tpserve.handler.http import HttpRequest, Signal
from tpserve.handler.open_request import Pending
from tpserve.handler.openai.answers import Head
from tpserve.handler.openai.chat_schema import ChatRequest
from tpserve.handler.openai.errors import error_reply
from tpserve.handler.openai.sampling_schema import Request
from tpserve.handler.replies import Reply

if TYPE_CHECKING:
    from tpserve.handler.backend import Backend
    from tpserve.handler.routes import Endpoint


def answered(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose every error is a reply in OpenAI's form."""

    @functools.wraps(endpoint)
    def answer(
        backend: Backend, request_id: str, request: HttpRequest, signal: Signal, stream: bool
    ) -> Pending | Reply:
        try:
            return endpoint(backend, request_id, request, signal, stream)
        except UnknownGrammarError:  # the backend's affair
            raise
        except Exception as e:  # noqa: BLE001 -- whatever it is, it is this request's alone, and logged there
            return error_reply(e)

    return answer


def head_of(backend: Backend, reply_id: str, asked: Request, n: int, live: bool) -> Head:
    """What a completion's reply begins with.

    Args:
        backend: that answers.
        reply_id: of the reply.
        asked: the request.
        n: answers to each prompt.
        live: the front can send a stream as it comes.
    """
    chat = isinstance(asked, ChatRequest)
    options = asked.stream_options
    return Head(
        reply_id,
        int(time.time()),
        backend.model_name,
        "chat.completion" if chat else "text_completion",
        "chat.completion.chunk" if chat else "text_completion",
        n,
        asked.stream is True,
        live,
        options is not None and options.include_usage is True,
    )

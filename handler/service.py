"""The backend process: starts the engine, and serves TorchServe in the way that its configuration asks for."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tpserve.engine.client import EngineClient
from tpserve.engine.errors import ConfigError
from tpserve.engine.grammar_check import GrammarChecker
from tpserve.engine.process import die_with_parent, kill_parent_with_grandparent, settle_heap
from tpserve.engine.requests import RequestReader
from tpserve.engine.sampling_params import Guided
from tpserve.engine.text.load import load_tokenizer
from tpserve.engine.text.tokenizer import Tokenizer, TokenizerError
from tpserve.engine.weights import tokenizer_path
from tpserve.handler.backend import Backend
from tpserve.handler.blocking import Batches
from tpserve.handler.config import HandlerConfig
from tpserve.handler.ending import Ending
from tpserve.handler.mailbox import Mailbox
from tpserve.handler.torchserve import Context
from tpserve.handler.tracing import RequestTracer

Handle = Callable[[Sequence[Mapping[str, Any]], Context], list[bytes]]

logger = logging.getLogger(__name__)


class Service:
    """One started model.

    Args:
        handle: answers one call of TorchServe.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    @classmethod
    def start(cls, context: Context) -> Service:
        """Reads the configuration and starts what this process has to be."""
        die_with_parent()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # When TorchServe has gone, the torchrun that it started would start its backends again, for nobody.
            kill_parent_with_grandparent()
        _quieten()
        if int(os.environ.get("RANK", "0")) != 0:  # under TorchServe's own torchrun, rank 0 does everything
            return cls(_idle)
        config = HandlerConfig.from_yaml(
            context.model_yaml_config, Path(str(context.system_properties["model_dir"])).resolve()
        )
        visible = config.visible_devices(
            context.system_properties.get("gpu_id"), os.environ.get("CUDA_VISIBLE_DEVICES")
        )
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        client = EngineClient(config.engine)
        backend = start_backend(config, client)
        atexit.register(client.close)
        if config.continuous_batching:
            mailbox = Mailbox(backend)
            handle, num_open = mailbox.handle, lambda: mailbox.num_open
        else:
            batches = Batches(backend)
            handle, num_open = batches.handle, lambda: batches.num_open
        Ending(client, backend.health, num_open).listen()
        return cls(handle)


def start_backend(config: HandlerConfig, client: EngineClient, model_name: str = "llama") -> Backend:
    """Starts an engine and returns what serves from it, whichever front it is for.

    Args:
        config: of the model.
        client: not started.
        model_name: what users call the model.

    Raises:
        ConfigError: the model cannot be served so.
        EngineError: the engine did not come up.
    """
    path = _tokenizer_path(config)
    tokenizer = None if path is None else _tokenizer(path)
    template = config.load_chat_template(tokenizer)
    info = client.start()
    logger.info("serving %s: %s", config.engine.checkpoint_dir, info)
    vocab_size = client.checkpoint.args.vocab_size
    grammars = None if path is None else GrammarChecker(path, vocab_size)
    reader = RequestReader(
        tokenizer, vocab_size, info.max_seq_len, _no_grammars if grammars is None else grammars.check
    )
    tracer = RequestTracer.from_environment()
    settle_heap()
    return Backend(
        client, tokenizer, reader, config.defaults, threading.Event(), model_name, template, tracer, grammars
    )


def _idle(data: Sequence[Mapping[str, Any]], _context: Context) -> list[bytes]:
    return [b""] * len(data)


def _no_grammars(guided: Guided) -> None:
    """Without a tokenizer there are none: the fields are refused before."""


def _tokenizer_path(config: HandlerConfig) -> Path | None:
    if config.tokenizer is not None:
        return config.tokenizer
    return tokenizer_path(Path(config.engine.checkpoint_dir))


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return load_tokenizer(path)
    except TokenizerError as e:
        raise ConfigError(str(e)) from None


def _quieten() -> None:
    """Drops TorchServe's line for every call: hundreds a second say nothing. Metrics travel as log lines and stay."""
    logging.getLogger().addFilter(lambda record: not record.msg.startswith("Backend received inference at"))

"""Whether a token can be made now: asked in a thread of its own, once for all who want to know at the same time."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

import msgspec

from tpserve.engine.errors import EngineError, public
from tpserve.handler.http import Signal
from tpserve.handler.replies import Reply, json_reply

if TYPE_CHECKING:
    from tpserve.handler.backend import Engine

_FRESH_S = 0.2  # probes need no key: however many come, the engine is asked no more often

logger = logging.getLogger(__name__)


class Health:
    """What probes are told.

    Args:
        engine: that is asked.

    Attributes:
        draining: the end has been asked for: nothing new is taken.
    """

    def __init__(self, engine: Engine) -> None:
        self.draining = False
        self._engine = engine
        self._lock = threading.Lock()
        self._known: tuple[float, str | None] | None = None  # when it was asked, and what it said
        self._waiting: list[Probe] = []

    def ask(self, signal: Signal, bare: bool = False) -> Probe | Reply:
        """200 when a token can be made, 503 with the reason when not.

        Args:
            signal: set when the reply is there.
            bare: without a body, as Triton has it.
        """
        with self._lock:
            if self._known is not None and time.monotonic() - self._known[0] < _FRESH_S:
                return self._reply(self._known[1], bare)
            probe = Probe(self, signal, bare)
            self._waiting.append(probe)
            if len(self._waiting) == 1:
                threading.Thread(target=self._run, name="tpserve-health", daemon=True).start()
            return probe

    def _run(self) -> None:
        try:
            reason = self._engine.unhealthy_reason()
        except Exception as e:  # nobody else would ever answer
            logger.exception("a probe")
            reason = str(e) if isinstance(e, EngineError) else "internal error"
        with self._lock:
            self._known = time.monotonic(), reason
            waiting, self._waiting = self._waiting, []
        for probe in waiting:
            probe.answer(reason)

    def _reply(self, reason: str | None, bare: bool) -> Reply:
        if self.draining:
            status, told = "draining", "the server is shutting down"
        elif reason is None:
            try:
                info = msgspec.structs.asdict(self._engine.info)
            except EngineError as e:  # since then
                status, told = "unavailable", public(str(e))
            else:
                return Reply(b"") if bare else json_reply({"status": "ready", **info})
        else:
            status, told = "unavailable", public(reason)
        return json_reply({"error": told} if bare else {"status": status, "reason": told}, 503)


class Probe:
    """A reply that comes when the engine has been asked; a `Pending`."""

    engine_ids: tuple[str, ...] = ()

    def __init__(self, health: Health, signal: Signal, bare: bool) -> None:
        self._health, self._signal, self._bare = health, signal, bare
        self._answered: tuple[str | None] | None = None

    def answer(self, reason: str | None) -> None:
        """Takes what the engine said."""
        self._answered = (reason,)
        self._signal.set()

    def take(self) -> Reply | None:
        """See `Pending`."""
        return None if self._answered is None else self._health._reply(self._answered[0], self._bare)

    def fail(self, message: str) -> None:
        """See `Pending`."""
        self.answer(message)

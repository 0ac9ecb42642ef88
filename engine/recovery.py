"""How long it took until a rank group served again."""

from __future__ import annotations

import logging

from tpserve.engine.metrics import EngineMetrics

logger = logging.getLogger(__name__)


class Recovery:
    """A stopwatch, read on a monotonic clock.

    Args:
        metrics: told of the last times.

    Attributes:
        awaits_token: a group is ready again, and none of the requests that it was given has got a token.
    """

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics
        self._died_s: float | None = None
        self.awaits_token = False

    def died(self, now_s: float) -> None:
        """A group's end was noticed."""
        if self._died_s is None or self.awaits_token:  # otherwise the one after it has not even come up
            self._died_s = now_s
        self.awaits_token = False

    def ready(self, now_s: float, num_requests: int) -> None:
        """A group is ready, and was given so many requests."""
        if self._died_s is None:
            return
        self._metrics.recovery_s = now_s - self._died_s
        logger.warning(
            "ready again %.2f s after the end of the last group; %d requests go on",
            self._metrics.recovery_s,
            num_requests,
        )
        self.awaits_token = num_requests > 0
        if not self.awaits_token:
            self._died_s = None

    def token(self, now_s: float) -> None:
        """A token has come."""
        if self.awaits_token and self._died_s is not None:
            self._metrics.recovery_to_token_s = now_s - self._died_s
            logger.warning("next token %.2f s after the end of the last group", self._metrics.recovery_to_token_s)
            self._died_s, self.awaits_token = None, False

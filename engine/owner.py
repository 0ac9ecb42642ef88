"""What the group's keeper asks of whoever the group works for."""

from __future__ import annotations

from typing import Protocol

from tpserve.engine.protocol import Event, Outputs, Ready


class Owner(Protocol):
    """Whom the group works for; called from the keeper's thread."""

    def replay(self, info: Ready) -> list[Event]:
        """What a new group must be told. The lock is held."""

    def take(self, outputs: Outputs) -> None:
        """Takes one step's tokens."""

    def tick(self, now_s: float) -> None:
        """Called at least every 50 ms."""

    def stopped(self) -> None:
        """A group is sent nothing any more. The lock is held."""

    def died(self, reason: str) -> int:
        """A group that was ready has ended; returns how many deaths, this one last, were one request's doing."""

    def end(self, finish_reason: str, error: str | None) -> None:
        """There will be no further tokens."""

"""The next rank group: launched and imported beside the present one, waiting to be told to go on."""

from __future__ import annotations

import logging
import time

from tpserve.engine.config import EngineConfig
from tpserve.engine.node_group import GroupOverNodes
from tpserve.engine.node_hub import NodeHub
from tpserve.engine.supervisor import RankGroup

_AGAIN_S = 30.0  # a standby that died by itself may do so again
_LOOK_S = 1.0

Group = RankGroup | GroupOverNodes

logger = logging.getLogger(__name__)


class Standby:
    """At most one waiting group. All calls but `pids` come from one thread, which the groups die with.

    Args:
        wanted: False: `take` launches a group when it is needed.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._group: Group | None = None
        self._hub: NodeHub | None = None
        self._not_before_s = 0.0
        self._looked_s = 0.0

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        group = self._group
        return [] if group is None else group.pids

    def tend(self, config: EngineConfig) -> None:
        """Sees that a group waits; called every now and then while another one serves.

        Args:
            config: of the next group.
        """
        if not self._wanted:
            return
        if self._group is not None:
            self._group.receive(0.0)  # notices its end
            reason = self._group.death or self._stopped()
            if reason is None:
                return
            logger.warning("the standby group: %s", reason)
            self._drop()
            self._not_before_s = time.monotonic() + _AGAIN_S
        if time.monotonic() >= self._not_before_s:
            try:
                self._group = self._new(config)
            except Exception:  # no disk, no process: whoever serves goes on
                logger.exception("launching a standby group")
                self._not_before_s = time.monotonic() + _AGAIN_S

    def take(self, config: EngineConfig) -> Group:
        """A group that has been told to go on: the one that waited, if it lives and is what is wanted.

        Raises:
            Exception: a new one could not be launched.
        """
        group, self._group = self._group, None
        if group is not None and (group.config != config or group.death is not None or group.is_stopped):
            group.kill()
            group = None
        if group is None:
            group = self._new(config)
        group.go()
        return group

    def _new(self, config: EngineConfig) -> Group:
        if config.num_nodes == 1:
            return RankGroup(config)
        if self._hub is None:
            self._hub = NodeHub(config)
        return GroupOverNodes(config, self._hub)

    def _stopped(self) -> str | None:
        now_s = time.monotonic()
        if self._group is None or now_s < self._looked_s + _LOOK_S:
            return None
        self._looked_s = now_s
        return "one of its processes was stopped" if self._group.is_stopped else None

    def close(self) -> None:
        """Leaves no process, and waits for no machine any more."""
        self._drop()
        hub, self._hub = self._hub, None
        if hub is not None:
            hub.close()

    def _drop(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.kill()

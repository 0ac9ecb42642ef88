"""One rank of a served group; started by torchrun, which the supervisor started: `python -m tpserve.engine.worker`."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from tpserve.engine.config import EngineConfig
from tpserve.engine.core import EngineCore
from tpserve.engine.errors import ConfigError, MissingDevicesError
from tpserve.engine.group import build_core, choose_device, process_group
from tpserve.engine.loop import follow, lead
from tpserve.engine.meeting import follower_channel, leader_channel
from tpserve.engine.message_stream import MessageStream
from tpserve.engine.preload import preload
from tpserve.engine.process import LAUNCHER_PID, LOG_LEVEL, die_with_parent
from tpserve.engine.protocol import Event, Failed, Outputs, Ready, Reply
from tpserve.engine.supervisor import wait_for_go
from tpserve.engine.weights import checkpoint_fingerprint
from tpserve.model.checkpoint import CheckpointError
from tpserve.model.parallel import TensorParallel

# The group is killed when a rank ends: the others wait so long for rank 0 to have said why.
_RANK_0_SAYS_WHY_S = 2.0
_LAST_WORD_S = 1.0
EXIT_REFUSED = 3  # the configuration or the checkpoint cannot be served: a relaunch would not help

logger = logging.getLogger(__name__)


class ClientSocket:
    """Rank 0's end of the client's socket; a `Frontend`.

    Args:
        folder: the group's 0700 directory.
    """

    def __init__(self, folder: Path) -> None:
        self._stream = MessageStream.connect(folder)
        self._decoder = msgspec.msgpack.Decoder(Event)
        self._encoder = msgspec.msgpack.Encoder()

    def receive(self, timeout_s: float) -> list[Event]:
        """Every event that has arrived; waits at most so long for the first."""
        if timeout_s > 0:
            self._stream.wait(timeout_s)
        elif self._stream.has_unsent:
            self._stream.flush()
        return [self._decoder.decode(message) for message in self._stream.receive()]

    def send_outputs(self, outputs: Outputs) -> None:
        """Sends one step's tokens."""
        self.send(outputs)

    def send(self, reply: Reply) -> None:
        """Sends anything."""
        self._stream.send([self._encoder.encode(reply)])

    def send_last(self, reply: Reply) -> None:
        """Sends the last word of a group that refuses to start, and waits until it is on its way."""
        self.send(reply)
        self._stream.flush_all(_LAST_WORD_S)

    def close(self) -> None:
        """Drops what is unsent."""
        self._stream.close()


def main(folder: Path, build: Callable[[EngineConfig, torch.device, TensorParallel], EngineCore] = build_core) -> int:
    """Serves the group described by `folder/config.json`; returns the process's exit status.

    Args:
        folder: see above.
        build: makes the rank's engine.
    """
    rank = int(os.environ.get("RANK", "0"))
    level = os.environ.get(LOG_LEVEL, "INFO")
    logging.basicConfig(level=level, format=f"%(asctime)s rank {rank} %(levelname)s %(message)s")
    die_with_parent(int(os.environ[LAUNCHER_PID]))
    config = msgspec.json.decode((folder / "config.json").read_bytes(), type=EngineConfig)
    if not wait_for_go(folder, lambda: preload(config)):
        return 1
    socket = ClientSocket(folder) if rank == 0 else None
    try:
        device = choose_device(config)
        with process_group(config, device) as tp:
            loads = checkpoint_fingerprint(Path(config.checkpoint_dir))
            core = build(config, device, tp)
            if socket is None:
                follow(core, config, follower_channel(tp, device, config.step_timeout_s, folder))
                core.close()
                return 0
            with leader_channel(tp, device, config.step_timeout_s, folder) as channel:
                sizes = tp.size, core.shape.num_blocks, config.block_size, config.max_seq_len
                socket.send(Ready(*sizes, str(device), loads))
                lead(core, config, channel, socket)
                core.close()
                return 0
    except (ConfigError, CheckpointError) as e:
        logger.error("%s", e)
        if socket is not None:
            socket.send_last(Failed(str(e), e.num_devices if isinstance(e, MissingDevicesError) else None))
        else:
            time.sleep(_RANK_0_SAYS_WHY_S)
        return EXIT_REFUSED


def run(build: Callable[[EngineConfig, torch.device, TensorParallel], EngineCore] = build_core) -> None:
    """The rank's whole process; the folder is its argument. Never returns."""
    status = 1
    try:
        status = main(Path(sys.argv[1]), build)
    except BaseException:
        logger.exception("this rank cannot go on")
    finally:
        # Not sys.exit: a collective that hangs in another thread must not keep a dead rank alive, and torch may abort
        # as it takes down what other ranks have left.
        logging.shutdown()
        os._exit(status)


if __name__ == "__main__":
    run()

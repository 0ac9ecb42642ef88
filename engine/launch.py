"""torchrun that dies with the process that asked for it: `python -m tpserve.engine.launch PARENT_PID STORE …`.

STORE says where torchrun's store is: "loopback", "elsewhere", or the number of an inherited socket that listens.
"""

from __future__ import annotations

import gc
import math
import os
import socket
import sys

from tpserve.engine.process import LAUNCHER_PID, die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.environ[LAUNCHER_PID] = str(os.getpid())
    gc.disable()  # as in `rank.py`
    # Imported here: they take seconds, in which the parent may end.
    from torch.distributed.run import main

    from tpserve.engine.forked_rank import fork_ranks, may_fork_ranks
    from tpserve.engine.loopback import listen_on, listen_on_loopback
    from tpserve.engine.preload import preload_for_ranks

    where, arguments = sys.argv[2], sys.argv[3:]
    if where == "loopback":
        arguments = ["--master-addr", "127.0.0.1", "--master-port", str(listen_on_loopback()), *arguments]
    elif where != "elsewhere":
        listen_on(socket.socket(fileno=int(where)))
    preload_for_ranks(math.prod(int(arguments[arguments.index(name) + 1]) for name in ("--nnodes", "--nproc-per-node")))
    if may_fork_ranks():
        fork_ranks()
    gc.freeze()
    gc.enable()
    main(arguments)

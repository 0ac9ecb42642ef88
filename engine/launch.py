"""torchrun that dies with the process that asked for it: `python -m tpserve.engine.launch PARENT_PID …`."""

from __future__ import annotations

import os
import sys

from tpserve.engine.process import LAUNCHER_PID, die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.environ[LAUNCHER_PID] = str(os.getpid())
    # Imported here: they take a second, in which the parent may end.
    from torch.distributed.run import main

    from tpserve.engine.loopback import listen_on_loopback

    main(["--master-addr", "127.0.0.1", "--master-port", str(listen_on_loopback()), *sys.argv[2:]])

"""torchrun that dies with the process that asked for it: `python -m tpserve.engine.launch PARENT_PID …`."""

from __future__ import annotations

import os
import sys

from tpserve.engine.process import LAUNCHER_PID, die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.environ[LAUNCHER_PID] = str(os.getpid())
    from torch.distributed.run import main

    main(sys.argv[2:])

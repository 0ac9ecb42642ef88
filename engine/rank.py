"""A rank that dies with its torchrun from its first moment on: `python -m tpserve.engine.rank MODULE FOLDER`.

Importing torch takes seconds, in which torchrun may end, and a tenth of them is garbage collection that finds nothing:
there is none before `settle_heap`.
"""

from __future__ import annotations

import gc
import os
import runpy
import sys

from tpserve.engine.process import LAUNCHER_PID, die_with_parent

if __name__ == "__main__":
    die_with_parent(int(os.environ[LAUNCHER_PID]))
    gc.disable()
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)

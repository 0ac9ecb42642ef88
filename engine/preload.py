"""What is imported before it is needed: by torchrun for all of its ranks, which are forks of it, and by a rank of a
standby group. Nothing of the device."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from pathlib import Path

from tpserve.engine.config import EngineConfig

NVIDIA = Path("/dev/nvidiactl")
# Imported where they are needed, for they need Triton.
_WITH_TRITON = ("chunk_graphs", "decode_step", "fused_forward")


def preload_for_ranks(num_ranks: int) -> None:
    """Imports what every one of so many ranks, on all machines, will import. Starts no thread and looks for no device:
    neither outlives a fork."""
    importlib.import_module("tpserve.engine.group")
    _preload_compiler(num_ranks)
    _preload_kernels()


def preload(config: EngineConfig) -> None:
    """Imports the modules that the engine would import later on. No CUDA context is made: that would take memory."""
    _preload_compiler(config.tensor_parallel_size)  # where ranks are not forks
    if config.device != "cpu" and NVIDIA.exists():
        _preload_kernels()
    elif config.tensor_parallel_size == 1 and config.fused_kernels and config.cuda_graphs:
        with contextlib.suppress(ImportError):  # without a compiler's support nothing is compiled later either
            importlib.import_module("torch._inductor.compile_fx")


def _preload_compiler(num_ranks: int) -> None:
    """A second, for what torch has imported by NCCL's first collective (2.11). Nothing else was seen to import it: one
    rank's loading and gloo, on a CPU."""
    if num_ranks > 1 and NVIDIA.exists():
        importlib.import_module("torch._dynamo")


def _preload_kernels() -> None:
    if NVIDIA.exists() and importlib.util.find_spec("triton") is not None:
        for name in _WITH_TRITON:
            importlib.import_module(f"tpserve.model.{name}")
        # Part of the name of each kernel on disk is a hash of Triton itself, which has hundreds of megabytes.
        with contextlib.suppress(ImportError, AttributeError):
            importlib.import_module("triton.runtime.cache").triton_key()

"""Compiles what a start compiles, for a Hopper GPU, where there is none: the kernels of a network of real widths, all
of a rank of two, and those of one rank's decode steps and draws. Nothing is launched.

    TRITON_CACHE_DIR=FOLDER python -m tests.interpreted.hopper OUT.json
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tests.model import test_kernel_variants as variants
from tpserve.model import kernels
from tpserve.model.args import ModelArgs
from tpserve.model.decoder import FusedDecoder
from tpserve.model.parallel import TensorParallel

CPU = torch.device("cpu")


class Hopper:
    """Triton's driver of an H200 that is not here. A fork has no device to ask for, as with the real one."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def get_current_device(self) -> int:
        assert os.getpid() == self._pid, "CUDA cannot be used in a fork"
        return 0

    def get_current_target(self) -> GPUTarget:
        assert os.getpid() == self._pid, "CUDA cannot be used in a fork"
        return GPUTarget("cuda", 90, 32)

    def get_current_stream(self, device: int) -> int:
        return 0


class Log(logging.Handler):
    """Keeps what is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def main() -> None:
    driver.set_active(Hopper())
    monkeypatch = pytest.MonkeyPatch()
    cuda: dict[str, Any] = {
        "get_device_properties": lambda _: SimpleNamespace(multi_processor_count=132, major=9, minor=0),
        "get_device_capability": lambda _: (9, 0),
        "set_device": lambda _: None,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    for layer in (torch.nn.Linear, torch.nn.Embedding):  # nobody looks at the weights
        monkeypatch.setattr(layer, "reset_parameters", lambda _: None)
    for name in ("is_hopper", "has_gluon"):
        monkeypatch.setattr(kernels, name, lambda *_: True)
    monkeypatch.setattr(variants, "ARGS", ModelArgs(4096, 2, 32, 8, 32000, 14336))
    from tpserve.model.kernels import precompile
    from tpserve.model.kernels.random_draw import RandomDraws

    here: list[str] = []
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: None if cache_hit else here.append(src.name)
    log = Log()
    precompile.logger.addHandler(log)
    precompile.logger.setLevel(logging.INFO)
    # On two ranks all; on one what decodes, of each way one, and draws: the others differ by numbers only.
    for size, batches in ((2, variants.BATCHES), (1, [1, 8, 64])):
        monkeypatch.setattr(variants, "BATCHES", batches)
        with monkeypatch.context() as patches, torch.no_grad():
            ways = variants.Ways(patches, torch.bfloat16, size, size > 1, True)
            decoder: Any = FusedDecoder.__new__(FusedDecoder)
            decoder.step, decoder.buckets, decoder._stage_decodes = ways.decode, variants.BATCHES, lambda *_: None
            with precompile.compiled_together(CPU, TensorParallel()):
                decoder.enqueue_all()
                if size == 2:
                    ways.mixed.compile()
                    ways.graphs.enqueue(ways.graphs.missing[0], num_layers=2)
                else:
                    tokens_RL = torch.zeros(variants.ROWS, variants.MAX_LEN, dtype=torch.int64)
                    RandomDraws(variants.ROWS, 32000, tokens_RL).enqueue_all(ways.decode.logits_SV[:1])
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    metadata = [json.loads(path.with_suffix(".json").read_text()) for path in folder.rglob("*.cubin")]
    found = {
        "kernels": sorted(about["hash"] for about in metadata),
        "names": sorted({about["name"] for about in metadata}),
        "shared": max(about["shared"] for about in metadata),
        "told": log.told,
        "here": here,
    }
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

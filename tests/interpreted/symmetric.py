"""torch's symmetric memory between processes of one machine, on a CPU: files that all ranks map."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

_PAUSE_S = 0.0003


class _Handle:
    """As `torch.distributed._symmetric_memory.rendezvous` returns it; `tensors`: every rank's."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors
        self.buffer_ptrs = [tensor.data_ptr() for tensor in tensors]

    def get_buffer(self, peer: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = self._tensors[peer]
        assert tensor.dtype == dtype
        return tensor.flatten()[: math.prod(shape)].view(shape)

    def barrier(self, channel: int) -> None:
        dist.barrier()


class _Stream:
    """What is enqueued is done at once: nothing to wait for."""

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: _Stream) -> None:
        pass

    def wait_event(self, event: _Stream) -> None:
        pass

    def record_event(self) -> _Stream:
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def wait_politely(patch: pytest.MonkeyPatch) -> None:
    """Ranks that wait for others leave them the processors, of which there are fewer than ranks."""
    from triton.runtime import interpreter

    from tpserve.model.kernels import all_reduce

    look, builder = all_reduce._all_there, type(interpreter.interpreter_builder)
    count = builder.create_atomic_rmw

    def look_and_pause(*args: Any) -> Any:
        there = look(*args)
        if not there:
            time.sleep(_PAUSE_S)
        return there

    def count_and_pause(*args: Any) -> Any:
        time.sleep(_PAUSE_S)  # what is counted is whom to wait for
        return count(*args)

    patch.setattr(all_reduce, "_all_there", look_and_pause)
    patch.setattr(builder, "create_atomic_rmw", count_and_pause)


def install(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Puts it in torch's place, with streams for what uses both.

    Args:
        folder: the same for all ranks, empty; better one in memory.
    """
    from torch.distributed import _symmetric_memory

    from tpserve.model.kernels.row_exchange import RowExchange

    counts, paths = itertools.count(), dict[int, str]()

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert device.type == "cpu"
        name = f"{next(counts)}-"  # ranks make theirs in the same order
        path = str(folder / f"{name}{dist.get_rank()}")
        flat = torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype)
        paths[flat.data_ptr()] = str(folder / name)
        return flat.view(shape)

    def rendezvous(tensor: torch.Tensor, group: dist.ProcessGroup) -> _Handle:
        dist.barrier(group)
        name, n = paths[tensor.data_ptr()], tensor.numel()
        return _Handle(
            [
                tensor.flatten() if rank == dist.get_rank(group)
                else torch.from_file(f"{name}{rank}", shared=True, size=n, dtype=tensor.dtype)
                for rank in range(dist.get_world_size(group))
            ]
        )  # fmt: skip

    patch.setattr(_symmetric_memory, "empty", empty)
    patch.setattr(_symmetric_memory, "rendezvous", rendezvous)
    patch.setattr(RowExchange, "make", lambda tp, *args: None if tp.size == 1 else RowExchange(tp, *args))
    patch.setattr(torch.cuda, "Stream", _Stream)
    patch.setattr(torch.cuda, "stream", lambda stream: stream)
    patch.setattr(torch.cuda, "current_stream", _Stream)

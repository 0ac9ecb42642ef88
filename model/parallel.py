"""Tensor parallelism, applied to the single-device network from outside.

A rank's parameters are plain tensors: its slices by `plan.shares`. Three explicit collectives complete them: one
all-reduce after `wo`, one after `w2`, one gather of the head's logits. DTensor's dispatch would cost more CPU time than
a small matrix product (120-160 microseconds a linear), and it cannot deal out eight heads to three ranks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from tpserve.model.args import ModelArgs
from tpserve.model.llama import Llama
from tpserve.model.plan import chunk_bounds, shares

# torch 2.13 gave them these names and deprecated the old ones, which 2.11 has.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

T = TypeVar("T")


def without_multicast() -> None:
    """Before NCCL's group is made: its few sums go through no multicast, as ours do not (`kernels/all_reduce.py`). A
    switch has room for few groups, which other people's jobs on the machine share."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")


@dataclasses.dataclass(frozen=True)
class TensorParallel:
    """This process's place in its tensor-parallel group.

    Attributes:
        rank: 0 … size - 1.
        size: ranks in the group.
        group: for collectives; None on one rank.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def from_world(cls) -> TensorParallel:
        """The default process group as one tensor-parallel group; a single rank when there is none."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sums `x` over the ranks, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def made_by_all(self, make: Callable[[], T], device: torch.device) -> T | None:
        """What `make` makes; None, on all ranks alike, if it raises a RuntimeError on one: as where a rank cannot reach
        another's memory. When it returns, all ranks have made theirs: nobody writes into what is still being zeroed.
        """
        made, ok = None, torch.ones(1, device=device)
        try:
            made = make()
        except RuntimeError:
            ok.zero_()
        return made if self.all_agree(ok) else None

    def all_agree(self, ok: torch.Tensor) -> bool:
        """Whether this number [1] is 1 on all ranks, and 0 on none."""
        if self.size > 1:
            dist.all_reduce(ok, dist.ReduceOp.MIN, group=self.group)
        return bool(ok.item())

    def gather_vocabulary(self, logits_NV: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Joins every rank's columns; [N, own columns] → [N, vocab_size], contiguous.

        The ranks' shares are equal up to the last ones (`chunk_bounds`), which are padded for the collective.
        """
        share = chunk_bounds(vocab_size, self.size)[0][1]
        n = logits_NV.shape[0]
        own = nn.functional.pad(logits_NV, (0, share - logits_NV.shape[1])).contiguous()
        joined = own.new_empty(self.size * n, share)
        all_gather(joined, own, group=self.group)
        whole = joined.view(self.size, n, share).transpose(0, 1).reshape(n, self.size * share)
        return whole[:, :vocab_size].contiguous()


def num_kv_heads(args: ModelArgs, tp: TensorParallel) -> int:
    """Key/value heads that this rank holds."""
    return shares(args, tp.size)[tp.rank].num_kv_heads


def shard(model: Llama, tp: TensorParallel) -> None:
    """Leaves of every parameter this rank's slice, uninitialised on the meta device, and puts in the collectives.

    Raises:
        ValueError: the heads cannot be split over so many ranks.
    """
    if tp.size == 1:
        return
    share, args = shares(model.args, tp.size)[tp.rank], model.args
    for name, parameter in list(model.named_parameters()):
        place = share.of(name, args.head_dim)
        if place is not None:
            dim, lo, hi = place
            sizes = list(parameter.shape)
            sizes[dim] = hi - lo
            owner, _, leaf = name.rpartition(".")
            local = nn.Parameter(torch.empty(sizes, dtype=parameter.dtype, device="meta"), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, local)
    for block in model.layers:
        block.attention.all_reduce = block.feed_forward.all_reduce = tp.all_reduce  # type: ignore[union-attr]
    model.gather = lambda logits_NV: tp.gather_vocabulary(logits_NV, args.vocab_size)

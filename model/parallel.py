"""Tensor parallelism, applied to the single-device network from outside.

DTensor is how weights are split and loaded; it is not how they are multiplied. Its dispatch costs more CPU time than
a small matrix product (120-160 microseconds a linear), so after loading `localize` leaves plain tensors and three
explicit collectives: one all-reduce after `wo`, one after `w2`, one gather of the head's logits.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from tpserve.model.args import ModelArgs
from tpserve.model.llama import Llama
from tpserve.model.plan import TP_DIM, chunk_bounds, kv_mesh_shape

# torch 2.13 gave it this name and deprecated the old one, which 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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

    def gather_vocabulary(self, logits_NV: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Joins every rank's columns; [N, own columns] → [N, vocab_size].

        The ranks' shares are equal up to the last ones (`chunk_bounds`), which are padded for the collective.
        """
        share = chunk_bounds(vocab_size, self.size)[0][1]
        n = logits_NV.shape[0]
        own = nn.functional.pad(logits_NV, (0, share - logits_NV.shape[1])).contiguous()
        joined = own.new_empty(self.size * n, share)
        _all_gather(joined, own, group=self.group)
        return joined.view(self.size, n, share).transpose(0, 1).reshape(n, self.size * share)[:, :vocab_size]


def kv_heads_per_rank(args: ModelArgs, tp_size: int) -> int:
    """Key/value heads that each rank holds."""
    groups, _ = kv_mesh_shape(args.n_heads, args.n_kv_heads, tp_size)
    return args.n_kv_heads // groups


def parallelize(model: Llama, tp: TensorParallel, device_type: str) -> None:
    """Turns the split weights into DTensors by the table `plan.TP_DIM`; works on the meta device, moves no data.

    Raises:
        ValueError: the heads cannot be split over so many ranks.
    """
    kv_groups, copies = kv_mesh_shape(model.args.n_heads, model.args.n_kv_heads, tp.size)
    mesh = DeviceMesh(device_type, torch.arange(tp.size))
    if copies > 1:
        # Neighbouring ranks hold copies of a KV head: split over the rows of a 2-D mesh, replicated along its columns.
        grid = DeviceMesh(device_type, torch.arange(tp.size).view(kv_groups, copies), mesh_dim_names=("kv", "copy"))
        kv_mesh = grid["kv"]
    else:
        kv_mesh = mesh
    for kind, dim in TP_DIM.items():
        if dim is None:
            continue
        style: ParallelStyle = ColwiseParallel() if dim == 0 else RowwiseParallel()
        target = kind.removesuffix(".weight")
        where = kv_mesh if target in ("attention.wk", "attention.wv") else mesh
        for parent in [model] if target == "output" else model.layers:
            parallelize_module(parent, where, {target: style})


def localize(model: Llama, tp: TensorParallel) -> None:
    """Replaces every DTensor by this rank's plain tensor, drops DTensor's hooks, and puts in the collectives."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            setattr(module, name, nn.Parameter(local.detach(), requires_grad=False))
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    if tp.size > 1:
        vocab_size = model.args.vocab_size
        for block in model.layers:
            block.attention.all_reduce = block.feed_forward.all_reduce = tp.all_reduce  # type: ignore[union-attr]
        model.gather = lambda logits_NV: tp.gather_vocabulary(logits_NV, vocab_size)

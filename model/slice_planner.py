"""Which bytes of a distributed checkpoint (DCP) a rank reads: its slices by the plan, into plain tensors.

DCP's own planner knows a rank's slice from its DTensor, and DTensor cuts evenly; this one is told.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


class SlicePlanner(LoadPlanner):
    """Plans the reading of one rank.

    Args:
        place: of a tensor's name: where this rank's slice begins (dimension, first, end); None: it is all of it.
    """

    def __init__(self, place: Callable[[str], tuple[int, int, int] | None]) -> None:
        self._place = place
        self._state: dict[str, torch.Tensor] = {}
        self._metadata: Metadata | None = None

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Takes the tensors to fill, each the rank's own slice."""
        self._state, self._metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        """A read for every stored chunk that a slice touches."""
        assert self._metadata is not None
        items: list[ReadItem] = []
        for name, tensor in self._state.items():
            place = self._place(name)
            offsets = [0] * tensor.ndim
            if place is not None:
                offsets[place[0]] = place[1]
            if tensor.numel():
                chunk = ChunkStorageMetadata(torch.Size(offsets), tensor.shape)
                stored = self._metadata.state_dict_metadata[name]
                items += create_read_items_for_chunk_list(name, stored, [chunk])  # type: ignore[arg-type]
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Ranks do not talk to each other."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """There are only tensors."""
        raise ValueError(f"{read_item.storage_index.fqn} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Where a read goes."""
        tensor = self._state[read_item.dest_index.fqn]
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, offset, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Any) -> None:
        """It is there already."""

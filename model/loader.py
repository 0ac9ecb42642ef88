"""From a converted checkpoint folder to a network on this rank: meta init → plan → DCP → plain tensors."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from tpserve.model.checkpoint import CheckpointError, CheckpointInfo
from tpserve.model.dcp_reader import MmapReader
from tpserve.model.llama import Llama
from tpserve.model.parallel import TensorParallel, localize, parallelize
from tpserve.model.rope import rope_table


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A network ready to run.

    Attributes:
        model: this rank's part, in evaluation mode, on its device.
        info: the checkpoint's `model.json`.
        tp: this rank's place in the group.
        device, dtype: of the weights.
        bytes_read: of checkpoint data that this rank copied.
    """

    model: Llama
    info: CheckpointInfo
    tp: TensorParallel
    device: torch.device
    dtype: torch.dtype
    bytes_read: int


def load_model(
    checkpoint_dir: Path,
    *,
    tp: TensorParallel | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    max_seq_len: int = 2048,
    dummy: bool = False,
) -> LoadedModel:
    """Loads this rank's part of a checkpoint; every rank reads only its own slices, without talking to the others.

    Args:
        checkpoint_dir: written by `tpserve convert`.
        tp: this rank's place; None: the default process group, or one rank without it.
        device: where the weights go.
        dtype: of the weights; None: the checkpoint's.
        max_seq_len: positions that the rotary table covers.
        dummy: fill the weights with random numbers; of the folder only `model.json` is read.

    Raises:
        CheckpointError: the folder is not a usable checkpoint.
        ValueError: its heads cannot be split over so many ranks.
    """
    tp = tp or TensorParallel.from_world()
    device = torch.device(device)
    info = CheckpointInfo.read(checkpoint_dir)
    dtype = dtype or getattr(torch, info.dtype)
    with torch.device("meta"):
        model = Llama(info.args, max_seq_len).to(dtype)
    if tp.size > 1:
        parallelize(model, tp, device.type)
    model.to_empty(device=device)
    if dummy:
        localize(model, tp)
        _fill_randomly(model, seed=tp.rank)
        model.rope_PC2 = rope_table(info.args, max_seq_len, device)
        return LoadedModel(model.eval(), info, tp, device, dtype, 0)
    reader = MmapReader(checkpoint_dir)
    state = model.state_dict()
    missing = state.keys() - reader.read_metadata().state_dict_metadata.keys()
    if missing:
        raise CheckpointError(f"{checkpoint_dir} lacks {sorted(missing)[0]}; convert the checkpoint again")
    # no_dist: coordination would pickle plans over sockets, and each rank can see for itself what it lacks.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(state, storage_reader=reader, no_dist=True)
        except CheckpointException as e:  # how DCP wraps what the reader said
            reason = next((error for error, _ in e.failures.values()), e)
            raise reason if isinstance(reason, CheckpointError) else CheckpointError(f"{checkpoint_dir}: {e}") from None
    localize(model, tp)
    model.rope_PC2 = rope_table(info.args, max_seq_len, device)
    return LoadedModel(model.eval(), info, tp, device, dtype, reader.bytes_copied)


@torch.no_grad()
def _fill_randomly(model: Llama, seed: int) -> None:
    """Weights under which activations keep a magnitude of about one, through any number of layers."""
    generator = torch.Generator(model.norm.weight.device)
    model.tok_embeddings.weight.normal_(generator=generator.manual_seed(0))  # every rank has all of it
    generator.manual_seed(seed + 1)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(1.0)
        elif name != "tok_embeddings.weight":
            weight.normal_(generator=generator).mul_(weight.shape[1] ** -0.5)

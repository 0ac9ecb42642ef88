"""From a checkpoint to a network on this rank: meta init → this rank's shapes by the plan → its slices, read."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from tpserve.model.checkpoint import MODEL_FILE, CheckpointError, CheckpointInfo
from tpserve.model.dcp_reader import MmapReader
from tpserve.model.llama import Llama
from tpserve.model.manifest import StoredManifest
from tpserve.model.parallel import TensorParallel, shard
from tpserve.model.plan import Share, shares
from tpserve.model.quantized import quantize
from tpserve.model.quantized_loader import QuantizedWeights
from tpserve.model.rope import rope_table
from tpserve.model.safetensors_reader import open_reader
from tpserve.model.slice_planner import SlicePlanner
from tpserve.model.staged_copy import StagedCopies, in_threads

# Of other people's weights in memory at a time, for each thread, beside the rank's own: less than malloc asks the
# kernel for anew each time, for of fresh pages one core fills 2 GB/s, of used ones 17.
_SLAB_BYTES = 4 << 20


class WeightTensor(Protocol):
    """A whole parameter in somebody's files, in Meta's layout."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, dim: int, lo: int, hi: int, dtype: torch.dtype) -> torch.Tensor:
        """Copies the slab [lo, hi) along `dim`."""
        ...


class WeightSource(Protocol):
    """Somebody's checkpoint; see `tpserve.convert`."""

    @property
    def info(self) -> CheckpointInfo: ...
    @property
    def tensors(self) -> Sequence[WeightTensor]: ...


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
    source: WeightSource | None = None,
) -> LoadedModel:
    """Loads this rank's part of a checkpoint; every rank reads only its own slices, without talking to the others.

    A checkpoint that is stored with fewer bits becomes a network with fewer bits.

    Args:
        checkpoint_dir: written by `tpserve convert`.
        tp: this rank's place; None: the default process group, or one rank without it.
        device: where the weights go.
        dtype: of the weights; None: the checkpoint's.
        max_seq_len: positions that the rotary table covers.
        dummy: fill the weights with random numbers; of the folder only `model.json` is read.
        source: where the weights are instead, in whatever form; of the folder nothing is read.

    Raises:
        CheckpointError: the folder is not a usable checkpoint.
        ValueError: its heads cannot be split over so many ranks.
    """
    tp = tp or TensorParallel.from_world()
    device = torch.device(device)
    info = CheckpointInfo.read(checkpoint_dir) if source is None else source.info
    dtype = dtype or getattr(torch, info.dtype)
    reader = None if dummy or source is not None else _open_reader(checkpoint_dir, info)
    try:
        with torch.device("meta"):
            model = Llama(info.args, max_seq_len).to(dtype)
    except RuntimeError as e:  # sizes whose product no integer holds
        raise CheckpointError(f"{checkpoint_dir / MODEL_FILE} describes no network ({e})") from None
    # Shapes are compared while they are whole.
    stored_dtype = getattr(torch, info.dtype)
    whole = {name: (tuple(t.shape), stored_dtype) for name, t in model.state_dict().items()}
    share = shares(info.args, tp.size)[tp.rank]
    quantized = None
    if info.quantization is not None and reader is not None:
        quantized = QuantizedWeights(model, info.quantization, share, device)
        whole = {n: stored for n, stored in whole.items() if n not in quantized.replaced} | quantized.stored
    shard(model, tp)
    model.to_empty(device=device)
    if dummy:
        bytes_read = 0
        _fill_randomly(model, seed=tp.rank)
    elif source is not None:
        with StagedCopies(device) as staged:
            bytes_read = _read_source(model, source, share, staged)
    else:
        assert reader is not None
        _check_stored(checkpoint_dir, whole, reader)
        with StagedCopies(device) as staged:
            reader.copy, reader.copies_by_threads = staged.copy, staged.by_threads
            _read_dcp(checkpoint_dir, model, reader, share, quantized)
        bytes_read = reader.bytes_copied
    if quantized is not None:
        quantized.put_in(dtype)
    elif info.quantization is not None:
        quantize(model, info.quantization)
    model.rope_PC2 = rope_table(info.args, max_seq_len, device)
    model.requires_grad_(False)
    return LoadedModel(model.eval(), info, tp, device, dtype, bytes_read)


def _read_dcp(folder: Path, model: Llama, reader: MmapReader, share: Share, quantized: QuantizedWeights | None) -> None:
    parts = quantized.tensors() if quantized is not None else {}

    def place(name: str) -> tuple[int, int, int] | None:
        return quantized.place(name) if quantized is not None and name in parts else share.of(name, model.args.head_dim)

    # no_dist: coordination would pickle plans over sockets, and each rank can see for itself what it lacks.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(model.state_dict() | parts, storage_reader=reader, planner=SlicePlanner(place), no_dist=True)
        except CheckpointException as e:  # how DCP wraps what the reader said
            reason = next((error for error, _ in e.failures.values()), e)
            if isinstance(reason, CheckpointError):
                raise reason from None
            said = next(iter(str(reason).splitlines()), "") or type(reason).__name__
            raise CheckpointError(f"{folder} cannot be read ({said}); convert the checkpoint again") from None


@torch.no_grad()
def _read_source(model: Llama, source: WeightSource, share: Share, staged: StagedCopies) -> int:
    """Copies this rank's slices of other people's files; returns the bytes."""
    parameters = model.state_dict()
    jobs: list[Callable[[], None]] = []
    for tensor in source.tensors:
        target = parameters.pop(tensor.name)
        dim, lo, hi = share.of(tensor.name, model.args.head_dim) or (0, 0, tensor.shape[0])
        if hi - lo == tensor.shape[dim]:
            dim, lo, hi = 0, 0, tensor.shape[0]
        # Every slab of columns touches the pages of all rows: fewer, larger ones.
        slab_bytes = _SLAB_BYTES if dim == 0 else 8 * _SLAB_BYTES
        step = max(1, slab_bytes * (hi - lo) // max(1, target.nbytes))
        for begin in range(lo, hi, step):
            end = min(begin + step, hi)
            jobs.append(
                partial(_read_slab, tensor, dim, begin, end, target.narrow(dim, begin - lo, end - begin), staged)
            )
    if parameters:
        raise CheckpointError(f"{next(iter(parameters))} is missing")
    if staged.by_threads:
        in_threads(jobs)
    else:
        for job in jobs:
            job()
    return sum(target.nbytes for target in model.state_dict().values())


@torch.no_grad()
def _read_slab(
    tensor: WeightTensor, dim: int, lo: int, hi: int, target: torch.Tensor, staged: StagedCopies
) -> None:  # fmt: skip
    staged.copy(target, tensor.read(dim, lo, hi, target.dtype))


def _open_reader(folder: Path, info: CheckpointInfo) -> MmapReader:
    """Everything about a folder that can be known before a weight is read.

    Raises:
        CheckpointError: model.json, .metadata and manifest.json do not fit together, or to the files.
    """
    manifest = StoredManifest.read(folder)
    reader = open_reader(folder, manifest)
    stored = reader.read_metadata().state_dict_metadata
    # A nonsensical n_layers must not make a network of that size first.
    last = f"layers.{info.args.n_layers - 1}"
    if not any(name.startswith(f"{last}.") for name in stored):
        raise CheckpointError(f"{folder} lacks {last}, which {MODEL_FILE} speaks of; convert the checkpoint again")
    for name, tensor in stored.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise CheckpointError(f"{folder / '.metadata'}: {name} is not a tensor; convert the checkpoint again")
    return reader


def _check_stored(folder: Path, expected: dict[str, tuple[tuple[int, ...], torch.dtype]], reader: MmapReader) -> None:
    """Holds what is stored against the network, and the files against the manifest.

    Args:
        folder: of the checkpoint.
        expected: the whole shape, and the type, of each of the network's weights.
        reader: of the folder.

    Raises:
        CheckpointError: they are of two models, or a file is not what was written.
    """
    stored = reader.read_metadata().state_dict_metadata
    for name in sorted(expected.keys() - stored.keys()):
        raise CheckpointError(f"{folder} lacks {name}; convert the checkpoint again")
    for name in sorted(stored.keys() - expected.keys()):
        raise CheckpointError(f"{folder} holds {name}, which {MODEL_FILE} does not describe; is it another model's?")
    for name, (shape, dtype) in expected.items():
        tensor = stored[name]
        assert isinstance(tensor, TensorStorageMetadata)
        if tensor.properties.dtype != dtype:
            raise CheckpointError(
                f"{folder / '.metadata'}: {name} is {tensor.properties.dtype}, but {MODEL_FILE} makes it {dtype}; "
                "convert the checkpoint again"
            )
        if tuple(tensor.size) != shape:
            raise CheckpointError(
                f"{folder / '.metadata'}: {name} is {tuple(tensor.size)}, but {MODEL_FILE} makes it {shape}; "
                "is one of them another model's? convert the checkpoint again"
            )
    if reader.manifest is not None:
        reader.manifest.check_files()


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

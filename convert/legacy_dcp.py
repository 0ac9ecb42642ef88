"""The output of TorchServe's old tp_llama example as a `Source`: a DCP folder without `model.json` or sums."""

from __future__ import annotations

from pathlib import Path

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tpserve.convert.dcp_source import DcpTensor, Files
from tpserve.convert.describe import read_legacy_args
from tpserve.convert.errors import ConvertError
from tpserve.convert.kinds import LEGACY_ARGS_FILE, Kind
from tpserve.convert.layout import EMBEDDING, format_shape, global_shape, is_dropped, parameter_names
from tpserve.convert.shard_files import DTYPES
from tpserve.convert.source import Source, plain_info
from tpserve.model.checkpoint import CheckpointError
from tpserve.model.dcp_reader import MmapReader


def open_legacy_dcp(folder: Path) -> Source:
    """Opens and checks what `convert_checkpoints.py` of the example wrote; no weight is read.

    Its script cut every tensor along dimension 0 over as many ranks as it ran on, under Meta's names.

    Raises:
        ConvertError: something is missing, unknown, or does not fit; the message names the file and the key.
    """
    reader = MmapReader(folder, None)
    try:
        metadata = reader.read_metadata()
    except CheckpointError as e:
        raise ConvertError(str(e)) from None
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    path = folder / ".metadata"
    stored = {name: t for name, t in metadata.state_dict_metadata.items() if not is_dropped(name)}
    embedding = stored.get(EMBEDDING)
    if not isinstance(embedding, TensorStorageMetadata) or len(embedding.size) != 2:
        raise ConvertError(f"{path} does not speak of {EMBEDDING}; these are not the weights of a Llama")
    args = read_legacy_args(folder, embedding.size[0])
    files, tensors = Files(folder, reader), []
    for name in parameter_names(args.n_layers):
        tensor = stored.pop(name, None)
        if not isinstance(tensor, TensorStorageMetadata):  # also ends a nonsensical n_layers
            raise ConvertError(f"{path} does not speak of {name}; is {LEGACY_ARGS_FILE} the one of these weights?")
        shape = global_shape(name, args)
        if tuple(tensor.size) != shape or tensor.properties.dtype not in DTYPES:
            raise ConvertError(
                f"{path}: {name} is {format_shape(tuple(tensor.size))} {tensor.properties.dtype}, but "
                f"{LEGACY_ARGS_FILE} makes it {format_shape(shape)}: is it the one of these weights?"
            )
        tensors.append(DcpTensor(name, shape, tensor, files))
    for name in stored:
        raise ConvertError(f"{path} speaks of {name}, which {LEGACY_ARGS_FILE} does not describe")
    info = plain_info(args, embedding.properties.dtype, Kind.LEGACY_DCP)
    return Source(info, tuple(tensors), Kind.LEGACY_DCP)

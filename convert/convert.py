"""Any checkpoint → a folder in one of four forms (see `docs/convert.md`)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from tpserve.convert.dcp_writer import ITEM_OVERHEAD_BYTES, write_dcp
from tpserve.convert.errors import ConvertError
from tpserve.convert.inputs import Input, bar, open_input
from tpserve.convert.manifest import Manifest
from tpserve.convert.output_folder import check_disk_space, check_out_dir, new_folder
from tpserve.convert.quantize import quantised
from tpserve.convert.tokenizer_out import hugging_face_files
from tpserve.convert.weights import Weight, stored_dtype
from tpserve.convert.write_hf import write_hf
from tpserve.convert.write_meta import check_mp, write_meta
from tpserve.convert.write_safetensors import write_layers
from tpserve.model.checkpoint import FORMAT, MODEL_FILE, SAFETENSORS_FORMAT, SCHEMES, CheckpointInfo
from tpserve.model.safetensors_reader import N_CHUNKS

LEGACY_ARGS_FILE = "model_args.json"
OWN_FORMATS = ("dcp", "safetensors")
FORMATS = (*OWN_FORMATS, "hf", "meta")
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def convert(
    ckpt_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    tokenizer_path: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    progress: bool = True,
    *,
    format: str = "dcp",
    mp: int | None = None,
    quantize: str | None = None,
    model_parallel_size: int | None = None,
    legacy_args: Mapping[str, int] | None = None,
) -> Path:
    """Converts a checkpoint, whatever its form, to a folder of the form that is asked for.

    Everything is checked before the first byte is written; `out_dir` appears complete or not at all.

    Args:
        ckpt_dir: the checkpoint, such as a folder with `consolidated.NN.pth` and `params.json`; never written to.
        out_dir: the new folder; must not exist or be empty.
        tokenizer_path: the tokenizer; None looks for it in `ckpt_dir` and its parent.
        dtype: float32, float16 or bfloat16 (or fp32, fp16, bf16); None keeps the embedding's.
        progress: show a bar with bytes and rate on stderr.
        format: dcp and safetensors are what `tpserve.model.loader` reads, hf is what `transformers` reads, meta is
            Meta's own.
        mp: number of shards of `meta`; None: 1.
        quantize: int8, int4 or fp8: the blocks' matrices are written so, in `dcp` and `safetensors`; None: as they are
            (what is quantised already stays so in `dcp` and `safetensors`, and is widened in `hf` and `meta`).
        model_parallel_size: how many shards there must be in `ckpt_dir`; None takes what there is.
        legacy_args: when given, the old example's `model_args.json` is written too, with these fields in it.

    Returns:
        `out_dir`, absolute.

    Raises:
        ConvertError: the checkpoint or a folder is not usable; the message names the file and the key.
    """
    source_dir, target = Path(ckpt_dir).absolute(), Path(out_dir).resolve()
    if dtype is not None and dtype not in _DTYPES:
        raise ConvertError(f"--dtype {dtype} is not known; choose float32, float16 or bfloat16")
    if format not in FORMATS:
        raise ConvertError(f"--format {format} is not known; choose one of {', '.join(FORMATS)}")
    if mp is not None and format != "meta":
        raise ConvertError(f"--mp is the number of Meta's shards; --format {format} loads at any number of ranks")
    if quantize is not None and quantize not in SCHEMES:
        raise ConvertError(f"--quantize {quantize} is not known; choose one of {', '.join(SCHEMES)}")
    if quantize is not None and format not in OWN_FORMATS:
        raise ConvertError(
            f"--quantize is for --format {' and '.join(OWN_FORMATS)}; --format {format} has no such weights"
        )
    try:
        check_out_dir(target)
        source = open_input(source_dir, Path(tokenizer_path) if tokenizer_path else None, model_parallel_size, progress)
    except OSError as e:
        raise ConvertError(f"{e.filename or source_dir} cannot be read: {e.strerror}") from e
    out_dtype, num_shards = _DTYPES[dtype] if dtype else source.dtype, mp or 1
    if format == "meta":
        check_mp(source.args, 1 if mp is None else mp)
    tensors, scheme = _written(source_dir, source, format, quantize, out_dtype)
    copies = [num_shards if len(t.shape) == 1 else 1 for t in tensors]  # each of Meta's shards has the norms
    sizes = [math.prod(t.shape) * stored_dtype(t, out_dtype).itemsize for t in tensors]
    weight_bytes = sum(size * n for size, n in zip(sizes, copies, strict=True))
    items = len(tensors) * (num_shards if format == "meta" else N_CHUNKS) + 1
    overhead_bytes = ITEM_OVERHEAD_BYTES * items + sum(
        map(len, source.tokenizer.files.values()) if source.tokenizer else ()
    )
    check_disk_space(target, weight_bytes + overhead_bytes)

    with new_folder(target, weight_bytes + overhead_bytes) as folder:
        manifest = Manifest(folder)
        if source.tokenizer:
            files = hugging_face_files(source.tokenizer) if format == "hf" else source.tokenizer.files
            for name, content in files.items():
                manifest.write_bytes(name, content)
        with bar("writing", weight_bytes, progress) as written:
            _write(folder, format, source, tensors, scheme, out_dtype, num_shards, manifest, written.update)
        if legacy_args is not None:
            manifest.write_bytes(LEGACY_ARGS_FILE, _legacy_json(source, legacy_args))
        manifest.write()
    return target


def _written(
    path: Path, source: Input, format: str, quantize: str | None, dtype: torch.dtype
) -> tuple[Sequence[Weight], str | None]:
    """The tensors that are written, and how they are quantised."""
    if format not in OWN_FORMATS:
        return source.tensors, None
    if source.quantization is None:
        return (source.tensors if quantize is None else quantised(source.tensors, quantize, dtype)), quantize
    if quantize not in (None, source.quantization):
        raise ConvertError(
            f"the weights of {path} are {source.quantization} already; quantise the checkpoint that it was made from"
        )
    return source.parts, source.quantization


def _write(
    folder: Path,
    format: str,
    source: Input,
    tensors: Sequence[Weight],
    scheme: str | None,
    dtype: torch.dtype,
    num_shards: int,
    manifest: Manifest,
    on_bytes: Callable[[int], object],
) -> None:
    tokenizer = source.tokenizer
    ids = {
        "bos_token_id": tokenizer.bos_token_id if tokenizer else None,
        "eos_token_id": tokenizer.eos_token_id if tokenizer else None,
    }
    ends = tokenizer.eos_token_ids if tokenizer else ()
    if format == "meta":
        write_meta(folder, source.args, tensors, dtype, num_shards, manifest, on_bytes)
        return
    if format == "hf":
        write_hf(folder, source.args, tensors, dtype, manifest, on_bytes, **ids, eos_token_ids=ends)
        return
    write = write_dcp if format == "dcp" else write_layers
    write(folder, tensors, dtype, manifest, on_bytes)
    info = CheckpointInfo(
        args=source.args,
        dtype=str(dtype).removeprefix("torch."),
        tokenizer=tokenizer.name if tokenizer else None,
        source=source.origin,
        format=FORMAT if format == "dcp" else SAFETENSORS_FORMAT,
        eos_token_ids=ends,
        quantization=scheme,
        **ids,
    )
    info.write(folder)
    manifest.add_written(MODEL_FILE)


def _legacy_json(source: Input, legacy_args: Mapping[str, int]) -> bytes:
    """The file that the TorchServe example's `model_args_path` named: its ModelArgs, with the real vocab_size."""
    defaults = {"n_kv_heads": None, "multiple_of": 256, "ffn_dim_multiplier": None, "norm_eps": 1e-5}
    fields = {
        **defaults,
        **source.params,
        "vocab_size": source.args.vocab_size,
        "model_parallel_size": source.num_shards,
        **legacy_args,
    }
    return (json.dumps(fields, indent=2) + "\n").encode()

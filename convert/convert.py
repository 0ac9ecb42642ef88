"""Fairscale checkpoint → checkpoint folder (see `docs/convert.md`)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tpserve.convert.checklist import read_checklist, verify_checklist
from tpserve.convert.dcp_writer import ITEM_OVERHEAD_BYTES, N_CHUNKS, write_dcp
from tpserve.convert.errors import ConvertError
from tpserve.convert.manifest import Manifest
from tpserve.convert.output_folder import check_disk_space, check_out_dir, new_folder
from tpserve.convert.shard_files import verify_shard
from tpserve.convert.source import Source, open_source
from tpserve.convert.tokenizer import TOKENIZER_FILE, Tokenizer, find_tokenizer
from tpserve.model.checkpoint import MODEL_FILE, CheckpointInfo

LEGACY_ARGS_FILE = "model_args.json"
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
    model_parallel_size: int | None = None,
    legacy_args: Mapping[str, int] | None = None,
) -> Path:
    """Converts Meta's Fairscale shards to the checkpoint folder that `tpserve.model.loader` reads.

    Everything is checked before the first byte is written; `out_dir` appears complete or not at all.

    Args:
        ckpt_dir: folder with `consolidated.NN.pth` and `params.json`; never written to.
        out_dir: the new folder; must not exist or be empty.
        tokenizer_path: SentencePiece model; None looks for `tokenizer.model` in `ckpt_dir` and its parent.
        dtype: float32, float16 or bfloat16 (or fp32, fp16, bf16); None keeps the embedding's.
        progress: show a bar with bytes and rate on stderr.
        model_parallel_size: how many shards there must be; None takes what there is.
        legacy_args: when given, the old example's `model_args.json` is written too, with these fields in it.

    Returns:
        `out_dir`, absolute.

    Raises:
        ConvertError: the checkpoint or a folder is not usable; the message names the file and the key.
    """
    source_dir, target = Path(ckpt_dir).absolute(), Path(out_dir).resolve()
    if dtype is not None and dtype not in _DTYPES:
        raise ConvertError(f"--dtype {dtype} is not known; choose float32, float16 or bfloat16")
    try:
        check_out_dir(target)
        sums = read_checklist(source_dir)
        source = open_source(source_dir)
        if model_parallel_size not in (None, len(source.shards)):
            raise ConvertError(
                f"--model_parallel_size is {model_parallel_size}, but {source_dir} holds {len(source.shards)} shards"
            )
        tokenizer = find_tokenizer(source_dir, Path(tokenizer_path) if tokenizer_path else None, source.args.vocab_size)
        with _bar("checking md5", sum(f.stat().st_size for f in sums), progress and bool(sums)) as bar:
            verify_checklist(sums, bar.update)
        unlisted = [shard for shard in source.shards if shard.path not in sums]
        unlisted_bytes = sum(shard.path.stat().st_size for shard in unlisted if shard.mapped)
        with _bar("checking crc32", unlisted_bytes, progress and bool(unlisted)) as bar:
            for shard in unlisted:
                verify_shard(shard, bar.update)
    except OSError as e:
        raise ConvertError(f"{e.filename or source_dir} cannot be read: {e.strerror}") from e
    out_dtype = _DTYPES[dtype] if dtype else source.dtype
    weight_bytes = sum(math.prod(t.shape) for t in source.tensors) * out_dtype.itemsize
    overhead_bytes = ITEM_OVERHEAD_BYTES * (N_CHUNKS * len(source.tensors) + 1) + (
        len(tokenizer.data) if tokenizer else 0
    )
    check_disk_space(target, weight_bytes + overhead_bytes)

    with new_folder(target, weight_bytes + overhead_bytes) as folder:
        manifest = Manifest(folder)
        with _bar("writing", weight_bytes, progress) as bar:
            write_dcp(folder, source.tensors, out_dtype, manifest, bar.update)
        if tokenizer:
            manifest.write_bytes(TOKENIZER_FILE, tokenizer.data)
        _checkpoint_info(source, out_dtype, tokenizer).write(folder)
        manifest.add_written(MODEL_FILE)
        if legacy_args is not None:
            manifest.write_bytes(LEGACY_ARGS_FILE, _legacy_json(source, legacy_args))
        manifest.write()
    return target


def _checkpoint_info(source: Source, dtype: torch.dtype, tokenizer: Tokenizer | None) -> CheckpointInfo:
    return CheckpointInfo(
        args=source.args,
        dtype=str(dtype).removeprefix("torch."),
        tokenizer=TOKENIZER_FILE if tokenizer else None,
        bos_token_id=tokenizer.bos_token_id if tokenizer else None,
        eos_token_id=tokenizer.eos_token_id if tokenizer else None,
        source={"kind": "fairscale", "model_parallel_size": len(source.shards)},
    )


def _legacy_json(source: Source, legacy_args: Mapping[str, int]) -> bytes:
    """The file that the TorchServe example's `model_args_path` named: its ModelArgs, with the real vocab_size."""
    defaults = {"n_kv_heads": None, "multiple_of": 256, "ffn_dim_multiplier": None, "norm_eps": 1e-5}
    fields = {
        **defaults,
        **source.params,
        "vocab_size": source.args.vocab_size,
        "model_parallel_size": len(source.shards),
        **legacy_args,
    }
    return (json.dumps(fields, indent=2) + "\n").encode()


def _bar(what: str, total_bytes: int, shown: bool) -> tqdm[Any]:
    return tqdm(None, desc=what, total=total_bytes, unit="B", unit_scale=True, unit_divisor=1024, disable=not shown)

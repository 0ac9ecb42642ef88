"""One random checkpoint in every form that is read, for measuring; weights are finite, bfloat16 (in GGUF: Q8_0)."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from tpserve.bench.cpu import write_shape
from tpserve.convert.convert import convert
from tpserve.convert.hf_config import hf_name
from tpserve.convert.hf_source import RotatedTensor, open_hf
from tpserve.convert.layout import global_shape, parameter_names
from tpserve.convert.source import open_source
from tpserve.convert.source_tensor import SourceTensor
from tpserve.model.args import ModelArgs

FORMS = ("meta", "hf", "bin", "gguf", "dcp", "safetensors")
_SHARDS = 2


@dataclasses.dataclass(frozen=True)
class Widths:
    """Of the network; layers are added until it is as large as wanted."""

    dim: int = 4096
    ffn_dim: int = 11008
    n_heads: int = 32
    multiple_of: int = 256


LLAMA_7B = Widths()


def write_synthetic_checkpoint(folder: Path, gib: float, vocab_size: int, widths: Widths = LLAMA_7B) -> int:
    """Writes a random bf16 checkpoint in two Fairscale shards.

    Args:
        folder: made here.
        gib: its least size in GiB; layers are added until it is reached.
        vocab_size: rows of the embedding.
        widths: of the network.

    Returns:
        The size of the weights in bytes, all shards together.
    """
    dim, half, part = widths.dim, widths.dim // _SHARDS, widths.ffn_dim // _SHARDS
    layer = {f"attention.{name}.weight": (half, dim) for name in ("wq", "wk", "wv")}
    layer |= {"attention.wo.weight": (dim, half), "feed_forward.w2.weight": (dim, part)}
    layer |= {"feed_forward.w1.weight": (part, dim), "feed_forward.w3.weight": (part, dim)}
    layer_bytes = 2 * _SHARDS * sum(rows * columns for rows, columns in layer.values())
    ends_bytes = 2 * 2 * vocab_size * dim
    n_layers = max(1, math.ceil((gib * 2**30 - ends_bytes) / layer_bytes))
    folder.mkdir(parents=True)
    params = {"dim": dim, "n_heads": widths.n_heads, "multiple_of": widths.multiple_of, "norm_eps": 1e-5,
              "vocab_size": -1, "n_layers": n_layers}  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    for rank in range(_SHARDS):
        generator = torch.Generator().manual_seed(rank)

        def random(rows: int, columns: int, generator: torch.Generator = generator) -> torch.Tensor:
            bits = torch.randint(-(2**15), 2**15, (rows, columns), dtype=torch.int16, generator=generator)
            return bits.bitwise_and_(~0x4000).view(torch.bfloat16)  # the exponent's first bit: below two, so finite

        shard = {"tok_embeddings.weight": random(vocab_size, half), "norm.weight": torch.ones(dim).bfloat16()}
        for i in range(n_layers):
            shard |= {f"layers.{i}.{name}": random(*shape) for name, shape in layer.items()}
            shard |= {f"layers.{i}.{n}.weight": shard["norm.weight"].clone() for n in ("attention_norm", "ffn_norm")}
        shard["output.weight"] = random(vocab_size // _SHARDS, dim)
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
        del shard
    return n_layers * layer_bytes + ends_bytes


def write_form(form: str, meta: Path, folder: Path) -> Path:
    """The checkpoint of `meta` in another form; the path to read it from.

    Args:
        form: one of `FORMS`.
        meta: written by `write_synthetic_checkpoint`.
        folder: where forms are kept; each is made once.
    """
    target = meta if form == "meta" else folder / form
    if target.exists():
        return target / "model.gguf" if form == "gguf" else target
    if form in ("hf", "dcp", "safetensors"):
        return convert(meta, target, format=form, progress=False)
    if form == "bin":
        _write_bin(write_form("hf", meta, folder), target)
        return target
    target.mkdir(parents=True)
    _write_gguf(target / "model.gguf", open_source(meta).args)
    return target / "model.gguf"


def _write_bin(hf: Path, folder: Path) -> None:
    """`pytorch_model-*.bin` with the tensors of a folder in safetensors, as `transformers` wrote them before."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((hf / "config.json").read_bytes())
    tensors = open_hf(hf).tensors
    weight_map: dict[str, str] = {}
    for number in range(_SHARDS):
        name, state = f"pytorch_model-{number + 1:05d}-of-{_SHARDS:05d}.bin", dict[str, torch.Tensor]()
        for tensor in tensors[number::_SHARDS]:
            assert isinstance(tensor, RotatedTensor | SourceTensor)
            state[hf_name(tensor.name)] = tensor.stored if isinstance(tensor, RotatedTensor) else tensor.parts[0]
        torch.save(state, folder / name)
        weight_map |= dict.fromkeys(state, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _write_gguf(path: Path, args: ModelArgs) -> None:
    """Random blocks of Q8_0: a half-precision scale and 32 signed bytes each."""
    import gguf
    import numpy as np

    from tpserve.convert.gguf_config import gguf_name

    rng: Any = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    write_shape(writer, args)
    for name in parameter_names(args.n_layers):
        shape = global_shape(name, args)
        if len(shape) == 1:
            writer.add_tensor(gguf_name(name), np.ones(shape, np.float32))
            continue
        blocks = rng.integers(0, 256, (shape[0], shape[1] // 32, 34), dtype=np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        data = blocks.reshape(shape[0], -1)
        writer.add_tensor(gguf_name(name), data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

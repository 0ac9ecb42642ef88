"""Every form of input, compared bit for bit with the weights that it was made from."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as dcp_save

from tests.helpers.foreign import hf_config, hf_weights, write_gguf, write_hf, write_legacy_dcp
from tests.helpers.shards import random_weights, write_fairscale_checkpoint
from tpserve.convert import gguf_source, hf_source, source_tensor
from tpserve.convert.convert import convert
from tpserve.convert.describe import describe
from tpserve.convert.kinds import Kind
from tpserve.convert.open_any import open_any
from tpserve.convert.source import Source
from tpserve.engine.config import EngineConfig
from tpserve.engine.weights import checkpoint_fingerprint, describe_checkpoint, open_weights, tokenizer_path
from tpserve.model.args import ModelArgs
from tpserve.model.loader import load_model
from tpserve.model.parallel import TensorParallel
from tpserve.model.rope import rope_table

# Heads of 32: what quantised rows want, and room for the rotary frequencies that Llama 3.1 scales.
PARAMS: dict[str, Any] = {
    "dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": 96,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that every matrix is read in several."""
    for module, name in ((source_tensor, "BLOCK_BYTES"), (hf_source, "BLOCK_BYTES"), (gguf_source, "_BLOCK_BYTES")):
        monkeypatch.setattr(module, name, 5000)


def assert_reads(source: Source, expected: dict[str, Tensor]) -> None:
    """Whole, and in slabs along both dimensions that respect no boundary of heads or blocks."""
    assert [t.name for t in source.tensors] == list(expected)
    for tensor in source.tensors:
        want = expected[tensor.name]
        assert tensor.shape == tuple(want.shape)
        assert torch.equal(tensor.read(0, 0, want.shape[0], want.dtype), want), tensor.name
        for dim in range(want.ndim):
            lo, hi = 3, want.shape[dim] - 5
            slab = tensor.read(dim, lo, hi, torch.float32)
            assert slab.is_contiguous()
            assert torch.equal(slab, want.narrow(dim, lo, hi - lo).float()), (tensor.name, dim)


def in_order(weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The weights in the order in which a Meta checkpoint of them is opened."""
    return {t.name: weights[t.name] for t in open_any(folder).tensors}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("form", "num_files"), [("safetensors", 3), ("safetensors", 1), ("bin", 1), ("bin", 2)])
def test_hugging_face(tmp_path: Path, form: str, num_files: int, dtype: torch.dtype) -> None:
    meta = write_fairscale_checkpoint(tmp_path / "meta", PARAMS, mp=2, dtype=dtype)
    theirs = hf_weights(meta, 32)
    theirs["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)  # a buffer in old files
    write_hf(tmp_path / "hf", theirs, hf_config(PARAMS, meta), form=form, num_files=num_files)
    source = open_any(tmp_path / "hf")
    assert source.kind is Kind.HUGGING_FACE
    assert source.args == open_any(tmp_path / "meta").args
    assert source.dtype == dtype
    assert_reads(source, in_order(meta, tmp_path / "meta"))
    assert (source.info.bos_token_id, source.info.eos_token_id) == (1, 2)
    assert source.info == describe(tmp_path / "hf")


@pytest.mark.parametrize("said", [True, False])
def test_tied_embeddings_are_read_twice(tmp_path: Path, said: bool) -> None:
    meta = random_weights(PARAMS)
    theirs = hf_weights(meta, 32)
    if not said:  # the file just has none
        del theirs["lm_head.weight"]
    write_hf(tmp_path, theirs, hf_config(PARAMS, meta, tie_word_embeddings=said))
    found = {t.name: t.read(0, 0, t.shape[0], torch.float32) for t in open_any(tmp_path).tensors}
    assert torch.equal(found["output.weight"], meta["tok_embeddings.weight"])


def test_rows_that_pad_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    meta = random_weights(PARAMS)
    write_hf(tmp_path, hf_weights(meta, 32), hf_config(PARAMS, meta, vocab_size=91))
    tensors = {t.name: t for t in open_any(tmp_path).tensors}
    for name in ("tok_embeddings.weight", "output.weight"):
        assert torch.equal(tensors[name].read(0, 0, 91, torch.float32), meta[name][:91])
        assert tensors[name].shape == (91, 128)


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_llama_3_1_s_rope(tmp_path: Path, where: str) -> None:
    meta = random_weights(PARAMS)
    theta = {"rope_theta": 500000.0}
    more = {where: LLAMA3, **theta} if where == "rope_scaling" else {where: LLAMA3 | theta}
    write_hf(tmp_path, hf_weights(meta, 32), hf_config(PARAMS, meta, **more))
    args = describe(tmp_path).args
    assert (args.rope_theta, args.use_scaled_rope, args.rope_scale_factor) == (500000.0, True, 32.0)
    assert args.rope_original_context_tokens == 8192


def test_mistral_without_a_window_is_the_same_network(tmp_path: Path) -> None:
    meta = random_weights(PARAMS)
    config = hf_config(PARAMS, meta, architectures=["MistralForCausalLM"], sliding_window=None, head_dim=32)
    write_hf(tmp_path, hf_weights(meta, 32), config)
    assert describe(tmp_path).args.n_kv_heads == 2


@pytest.mark.parametrize("quantised", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_gguf(tmp_path: Path, quantised: str) -> None:
    meta = write_fairscale_checkpoint(tmp_path / "meta", PARAMS, mp=1)
    stored = write_gguf(tmp_path / "model.gguf", PARAMS, meta, quantised)
    source = open_any(tmp_path / "model.gguf")
    assert source.kind is Kind.GGUF
    assert source.args == open_any(tmp_path / "meta").args
    assert source.info.dtype == {"F32": "float32", "F16": "float16"}.get(quantised, "bfloat16")
    assert_reads(source, in_order(stored, tmp_path / "meta"))
    if quantised == "F32":
        assert_reads(source, in_order(meta, tmp_path / "meta"))


def test_gguf_in_a_folder_with_tied_embeddings_and_scaled_rope(tmp_path: Path) -> None:
    params = PARAMS | {"rope_theta": 500000.0}
    meta = random_weights(params)
    plain = ModelArgs.from_params(params)
    scaled = ModelArgs.from_dict(plain.to_dict() | {"use_scaled_rope": True, "rope_scale_factor": 32.0})
    # The file holds by how much each frequency is divided: the angles at position 1 are the frequencies.
    tables = [rope_table(args, 2, "cpu")[1].double() for args in (plain, scaled)]
    one, other = (torch.atan2(t[:, 1], t[:, 0]) for t in tables)
    factors = (one / other).numpy()
    assert factors.max() > 31
    del meta["output.weight"]
    write_gguf(tmp_path / "model.gguf", params, meta, "Q8_0", rope_factors=np.asarray(factors))
    source = open_any(tmp_path)
    assert source.args == scaled
    tensors = {t.name: t for t in source.tensors}
    rows = [tensors[name].read(0, 0, 96, torch.float32) for name in ("tok_embeddings.weight", "output.weight")]
    assert torch.equal(*rows)


@pytest.mark.parametrize("above", [True, False])
def test_the_old_example_s_dcp(tmp_path: Path, above: bool) -> None:
    meta = write_fairscale_checkpoint(tmp_path / "meta", PARAMS, mp=2, dtype=torch.bfloat16)
    folder = tmp_path / "run" / "converted"
    write_legacy_dcp(folder, meta)
    args = '{"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96, "multiple_of": 32, '
    args += '"ffn_dim_multiplier": null, "norm_eps": 1e-05, "max_batch_size": 4, "max_seq_len": 512}'
    ((folder.parent if above else folder) / "model_args.json").write_text(args)
    source = open_any(folder)
    assert (source.kind, source.dtype) == (Kind.LEGACY_DCP, torch.bfloat16)
    assert source.args == open_any(tmp_path / "meta").args
    assert_reads(source, in_order(meta, tmp_path / "meta"))
    assert source.info == describe(folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_dcp_itself_writes(tmp_path: Path) -> None:
    meta = write_fairscale_checkpoint(tmp_path / "meta", PARAMS, mp=1)
    dcp_save(dict(meta), storage_writer=FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    (tmp_path / "meta" / "params.json").rename(tmp_path / "dcp" / "model_args.json")
    source = open_any(tmp_path / "dcp")
    assert_reads(source, {t.name: meta[t.name] for t in source.tensors})


@pytest.mark.parametrize("mp", [1, 2])
@pytest.mark.parametrize("embedding_dim", [0, 1])
def test_meta_s_and_our_own(tmp_path: Path, mp: int, embedding_dim: int) -> None:
    params = {name: value for name, value in PARAMS.items() if name != "vocab_size"}
    meta = write_fairscale_checkpoint(
        tmp_path / "meta", params, mp, dtype=torch.float16, vocab_size=96, embedding_dim=embedding_dim
    )
    source = open_any(tmp_path / "meta")
    assert (source.kind, len(source.shards)) == (Kind.META, mp)
    assert_reads(source, in_order(meta, tmp_path / "meta"))
    assert describe(tmp_path / "meta").args == source.args
    ours = open_any(convert(tmp_path / "meta", tmp_path / "ours", progress=False))
    assert ours.kind is Kind.TPSERVE
    assert ours.args == source.args
    assert_reads(ours, in_order(meta, tmp_path / "meta"))


@pytest.mark.filterwarnings("ignore:.*zipfile_serialization.*")
def test_files_of_an_old_torch(tmp_path: Path) -> None:
    """One pickle stream, which cannot be mapped."""
    meta = random_weights(PARAMS, dtype=torch.float16)
    write_hf(tmp_path, hf_weights(meta, 32), hf_config(PARAMS, meta), form="bin")
    path = tmp_path / "pytorch_model.bin"
    content = torch.load(path, weights_only=True)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert describe(tmp_path).dtype == "float16"
    source = open_any(tmp_path)
    assert_reads(source, {t.name: meta[t.name] for t in source.tensors})


def test_describing_does_not_load_torch(tmp_path: Path) -> None:
    """The process that holds the users' connections describes, and stays small."""
    meta = write_fairscale_checkpoint(tmp_path / "meta", PARAMS, mp=2)
    write_hf(tmp_path / "st", hf_weights(meta, 32), hf_config(PARAMS, meta))
    write_hf(tmp_path / "bin", hf_weights(meta, 32), hf_config(PARAMS, meta), form="bin")
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "model.gguf", PARAMS, meta)
    write_legacy_dcp(tmp_path / "old", meta)
    (tmp_path / "old" / "model_args.json").write_text((tmp_path / "meta" / "params.json").read_text())
    convert(tmp_path / "meta", tmp_path / "ours", progress=False)
    code = (
        "import pathlib, sys\n"
        "from tpserve.convert.describe import describe\n"
        "found = [describe(p) for p in sorted(pathlib.Path(sys.argv[1]).iterdir())]\n"
        "assert len(found) == 6 and len({i.args for i in found}) == 1, found\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_large_file_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """A sparse file of 256 MiB: only the returned slab and a block may be in memory."""
    rows, columns = 16384, 8192
    header = json.dumps({"x": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, rows * columns * 2]}})
    path = tmp_path / "model.safetensors"
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(header)) + header.encode())
        f.truncate(8 + len(header) + rows * columns * 2)
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from tpserve.convert.hf_source import RotatedTensor, _safetensors\n"
        "from tpserve.convert.source_tensor import SourceTensor\n"
        "x = _safetensors(Path(sys.argv[1]))['x']\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "before = peak()\n"
        "for t in (RotatedTensor('wq', x, 128, True), SourceTensor('wo', tuple(x.shape), (x,), 0, True)):\n"
        "    t.read(0, 64, 4160, torch.bfloat16)\n"
        "    t.read(1, 64, 128, torch.bfloat16)\n"
        "print(peak() - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    slab_bytes = 4096 * columns * 2
    assert int(run.stdout) < slab_bytes + (96 << 20)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_ranks_read_their_slices_of_any_form(tmp_path: Path, size: int) -> None:
    meta = write_fairscale_checkpoint(tmp_path / "meta", PARAMS, mp=2)
    write_hf(tmp_path / "hf", hf_weights(meta, 32), hf_config(PARAMS, meta), num_files=2)
    write_gguf(tmp_path / "model.gguf", PARAMS, meta)
    converted = convert(tmp_path / "meta", tmp_path / "ours", progress=False)
    for rank in range(size):
        tp = TensorParallel(rank, size)
        expected = load_model(converted, tp=tp, max_seq_len=8).model.state_dict()
        for path in (tmp_path / "meta", tmp_path / "hf", tmp_path / "model.gguf"):
            source = open_weights(EngineConfig(checkpoint_dir=str(path)))
            loaded = load_model(path, tp=tp, max_seq_len=8, source=source)
            assert loaded.info.args == source.args
            found = loaded.model.state_dict()
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected), (path.name, rank)
    assert open_weights(EngineConfig(checkpoint_dir=str(converted))) is None


def test_what_the_engine_asks_of_a_checkpoint(tmp_path: Path, tokenizer_model: bytes) -> None:
    meta = write_fairscale_checkpoint(tmp_path / "llama" / "7b", PARAMS, mp=1)
    (tmp_path / "llama" / "tokenizer.model").write_bytes(tokenizer_model)
    path = tmp_path / "llama" / "7b"
    assert describe_checkpoint(path).eos_token_id == 2
    assert tokenizer_path(path) == tmp_path / "llama" / "tokenizer.model"  # where Meta's download puts it
    assert open_any(path).tokenizer_files == (tmp_path / "llama" / "tokenizer.model",)
    config = EngineConfig(checkpoint_dir=str(path), load_format="dummy")
    loaded = load_model(path, max_seq_len=8, source=open_weights(config), dummy=True)
    assert loaded.bytes_read == 0
    write_gguf(tmp_path / "model.gguf", PARAMS, meta)
    assert tokenizer_path(tmp_path / "model.gguf") is None
    before = checkpoint_fingerprint(path)
    assert checkpoint_fingerprint(path) == before
    write_fairscale_checkpoint(path, PARAMS, mp=1, seed=1)
    assert checkpoint_fingerprint(path) != before

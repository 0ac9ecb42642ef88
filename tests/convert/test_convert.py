"""A sound checkpoint comes out with every weight where it belongs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.convert.reading import assert_same, load_stock, metadata, stored_item
from tests.helpers.shards import TINY_PARAMS, random_weights, write_fairscale_checkpoint
from tpserve.convert import source_tensor
from tpserve.convert.convert import convert
from tpserve.convert.errors import ConvertError
from tpserve.convert.manifest import verify_manifest
from tpserve.model.checkpoint import CheckpointInfo

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="shared/data/stories260K is not here")


@pytest.mark.parametrize(("mp", "embedding_dim"), [(1, 1), (2, 1), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_pytorch_reads_back_equal_weights(
    tmp_path: Path, mp: int, embedding_dim: int, dtype: torch.dtype
) -> None:
    weights = write_fairscale_checkpoint(tmp_path / "in", mp=mp, dtype=dtype, embedding_dim=embedding_dim)
    out = convert(tmp_path / "in", tmp_path / "out", progress=False)
    assert_same(load_stock(out, weights), weights)


def test_the_output_does_not_depend_on_the_number_of_shards(tmp_path: Path) -> None:
    manifests = []
    for mp in (1, 2):
        write_fairscale_checkpoint(tmp_path / f"in{mp}", mp=mp)
        out = convert(tmp_path / f"in{mp}", tmp_path / f"out{mp}", progress=False)
        manifests.append(json.loads((out / "manifest.json").read_text())["sha256"])
        del manifests[-1]["model.json"]  # names the number of shards
    assert manifests[0] == manifests[1]


def test_pytorchs_own_tool_turns_the_folder_into_one_file(ckpt: Path, tmp_path: Path) -> None:
    weights = random_weights(TINY_PARAMS)
    out = convert(ckpt, tmp_path / "out", progress=False)
    dcp_to_torch_save(out, tmp_path / "whole.pth")
    assert_same(torch.load(tmp_path / "whole.pth", weights_only=True), weights)


@needs_stories
@pytest.mark.parametrize("mp", [1, 2, 4])
def test_stories260k(tmp_path: Path, mp: int) -> None:
    out = convert(STORIES / f"mp{mp}", tmp_path / "out", progress=False)
    whole = torch.load(STORIES / "mp1" / "consolidated.00.pth", weights_only=True)
    whole.pop("rope.freqs", None)
    assert_same(load_stock(out, whole), whole)
    info = CheckpointInfo.read(out)
    assert (info.args.vocab_size, info.args.ffn_hidden_dim, info.args.n_kv_heads) == (512, 172, 4)
    assert (info.dtype, info.tokenizer, info.bos_token_id, info.eos_token_id) == ("float16", "tokenizer.model", 1, 2)
    verify_manifest(out)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    n_parts=st.integers(1, 4),
    join_dim=st.integers(0, 1),
    dim=st.integers(0, 1),
    n_chunks=st.integers(1, 9),
    block_bytes=st.sampled_from([1, 40, 1 << 20]),
)
def test_merge_undoes_split(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    columns: int,
    n_parts: int,
    join_dim: int,
    dim: int,
    n_chunks: int,
    block_bytes: int,
) -> None:
    monkeypatch.setattr(source_tensor, "BLOCK_BYTES", block_bytes)
    size = [rows, columns]
    size[join_dim] *= n_parts
    weight = torch.arange(rows * columns * n_parts, dtype=torch.float32).reshape(size)
    parts = tuple(part.clone() for part in weight.chunk(n_parts, join_dim))
    tensor = source_tensor.SourceTensor("w", tuple(size), parts, join_dim, mapped=False)
    start, slabs = 0, []
    for expected in weight.chunk(n_chunks, dim):
        slabs.append(tensor.read(dim, start, start + expected.shape[dim], torch.float32))
        start += expected.shape[dim]
        assert torch.equal(slabs[-1], expected)
        assert slabs[-1].is_contiguous()
    assert torch.equal(torch.cat(slabs, dim), weight)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_llama_survives_conversion(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    mp = data.draw(st.sampled_from([1, 2, 3]), "mp")
    kv_heads = mp * data.draw(st.integers(1, 2), "kv_heads / mp")
    heads = kv_heads * data.draw(st.integers(1, 2), "heads / kv_heads")
    params = {
        "dim": heads * data.draw(st.sampled_from([2, 4, 6]), "head_dim"),
        "n_layers": data.draw(st.integers(1, 3), "n_layers"),
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "multiple_of": mp * data.draw(st.integers(1, 3), "multiple_of / mp"),
        "vocab_size": -1,
    }
    vocab = mp * data.draw(st.integers(1, 20), "vocab / mp")
    folder = tmp_path_factory.mktemp("any")
    weights = write_fairscale_checkpoint(
        folder / "in", params, mp, vocab_size=vocab, embedding_dim=data.draw(st.integers(0, 1), "embedding_dim")
    )
    assert_same(load_stock(convert(folder / "in", folder / "out", progress=False), weights), weights)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("flag", "dtype"), [("fp32", torch.float32), ("float16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_dtype_is_cast_while_writing(tmp_path: Path, flag: str, dtype: torch.dtype) -> None:
    weights = write_fairscale_checkpoint(tmp_path / "in", dtype=torch.float32)
    out = convert(tmp_path / "in", tmp_path / "out", dtype=flag, progress=False)
    assert_same(load_stock(out, weights, dtype), {name: w.to(dtype) for name, w in weights.items()})
    assert CheckpointInfo.read(out).dtype == str(dtype).removeprefix("torch.")


def test_a_weight_of_another_dtype_takes_the_embeddings(ckpt: Path, tmp_path: Path) -> None:
    for path in ckpt.glob("*.pth"):
        shard = torch.load(path, weights_only=True)
        torch.save({k: w if "norm" in k else w.bfloat16() for k, w in shard.items()}, path)
    expected = {name: w.bfloat16() for name, w in random_weights(TINY_PARAMS).items()}
    assert_same(load_stock(convert(ckpt, tmp_path / "out", progress=False), expected), expected)


def test_values_beyond_float16_stop_the_conversion(ckpt: Path, tmp_path: Path) -> None:
    path = ckpt / "consolidated.01.pth"
    shard = torch.load(path, weights_only=True)
    shard["layers.1.feed_forward.w2.weight"][3, 3] = 1e6
    torch.save(shard, path)
    with pytest.raises(ConvertError, match=r"layers\.1\.feed_forward\.w2\.weight has values that float16 cannot hold"):
        convert(ckpt, tmp_path / "out", dtype="fp16", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_files_of_torch_before_1_6_and_parameters_convert_too(ckpt: Path, tmp_path: Path) -> None:
    for path in ckpt.glob("*.pth"):
        shard = torch.load(path, weights_only=True)
        shard = {k: torch.nn.Parameter(w) for k, w in shard.items()}
        torch.save(shard, path, _use_new_zipfile_serialization=False)
    weights = random_weights(TINY_PARAMS)
    out = convert(ckpt, tmp_path / "out", progress=False)
    assert_same(load_stock(out, weights), weights)
    assert not any(stored_item(out, info, tmp_path).requires_grad for info in metadata(out).storage_data.values())


def test_buffers_of_metas_runtime_are_dropped(ckpt: Path, tmp_path: Path) -> None:
    for path in ckpt.glob("*.pth"):
        shard = torch.load(path, weights_only=True)
        shard["layers.0.attention.inner_attention.rope.freqs"] = torch.arange(4)  # an integer buffer is no weight
        torch.save(shard, path)
    names = metadata(convert(ckpt, tmp_path / "out", progress=False)).state_dict_metadata
    assert set(names) == set(random_weights(TINY_PARAMS))

"""How a conversion writes: files and chunks, the memory it takes, the manifest, the progress bar."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.convert.reading import metadata, stored_item
from tests.helpers.shards import TINY_PARAMS, random_weights
from tpserve.convert import source_tensor
from tpserve.convert.convert import convert
from tpserve.convert.errors import ConvertError
from tpserve.convert.manifest import verify_manifest
from tpserve.convert.shard_files import open_shard
from tpserve.model.plan import tp_dim


def test_every_tensor_is_cut_in_8_along_its_tp_dimension(ckpt: Path, tmp_path: Path) -> None:
    meta = metadata(convert(ckpt, tmp_path / "out", progress=False))
    for name, weight in random_weights(TINY_PARAMS).items():
        dim = tp_dim(name) or 0
        expected = [tuple(c.shape) for c in weight.chunk(8 if weight.ndim > 1 else 1, dim)]
        assert [tuple(c.sizes) for c in meta.state_dict_metadata[name].chunks] == expected, name


def test_one_file_a_layer_and_one_plain_storage_an_item(ckpt: Path, tmp_path: Path) -> None:
    out = convert(ckpt, tmp_path / "out", progress=False)
    layers = {"tok_embeddings", "layers.0", "layers.1", "norm", "output"}
    assert {p.name for p in out.iterdir()} == {f"{name}.distcp" for name in layers} | {
        ".metadata",
        "model.json",
        "manifest.json",
    }
    for index, info in metadata(out).storage_data.items():
        assert index.fqn.startswith(info.relative_path.removesuffix(".distcp") + ".")
        item = stored_item(out, info, tmp_path)
        assert item.is_contiguous()
        assert item.untyped_storage().nbytes() == item.nbytes


def test_never_more_than_one_chunk_is_in_memory(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, chunks = source_tensor.SourceTensor.read, []

    def remember(self: source_tensor.SourceTensor, *where: Any) -> Tensor:
        assert all(chunk() is None for chunk in chunks)
        data = read(self, *where)
        chunks.append(weakref.ref(data))
        assert data.ndim == 1 or data.numel() <= -(-max(self.shape) // 8) * min(self.shape)
        return data

    monkeypatch.setattr(source_tensor.SourceTensor, "read", remember)
    convert(ckpt, tmp_path / "out", progress=False)
    assert len(chunks) == 16 * 8 + 5


def test_pages_of_the_source_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "consolidated.00.pth"
    torch.save({"output.weight": torch.zeros(2048, 1024)}, path)  # 8 MiB
    shard = open_shard(path)
    weight = shard.tensors["output.weight"]

    def resident_bytes() -> int:
        maps = Path("/proc/self/smaps").read_text().split(str(path))[1:]
        return sum(int(re.search(r"Rss: +(\d+) kB", m)[1]) * 1024 for m in maps)

    monkeypatch.setattr(source_tensor, "BLOCK_BYTES", 256 << 10)
    source_tensor.SourceTensor("output.weight", (2048, 1024), (weight,), 0, shard.mapped).read(0, 0, 2048, weight.dtype)
    assert resident_bytes() <= 512 << 10
    weight.sum()
    assert resident_bytes() >= 8 << 20  # so the figure above is not of another file


def test_model_json_says_what_design_md_promises(ckpt: Path, tmp_path: Path) -> None:
    out = convert(ckpt, tmp_path / "out", progress=False)
    fields = json.loads((out / "model.json").read_text())
    assert (fields["format"], fields["version"], fields["dtype"]) == ("tpserve-dcp", 1, "float32")
    assert fields["source"] == {"kind": "fairscale", "model_parallel_size": 2}
    assert (fields["tokenizer"], fields["bos_token_id"], fields["eos_token_id"]) == (None, None, None)
    assert (fields["args"]["ffn_hidden_dim"], fields["args"]["vocab_size"]) == (88, 90)


def test_manifest_notices_any_change(ckpt: Path, tmp_path: Path) -> None:
    out = convert(ckpt, tmp_path / "out", progress=False)
    verify_manifest(out)
    victim = out / "layers.1.distcp"
    sound = victim.read_bytes()
    victim.write_bytes(sound[:5000] + bytes([sound[5000] ^ 1]) + sound[5001:])
    with pytest.raises(ConvertError, match=r"layers\.1\.distcp has SHA-256"):
        verify_manifest(out)
    victim.write_bytes(sound[:-1])
    with pytest.raises(ConvertError, match=rf"layers\.1\.distcp has {len(sound) - 1} bytes"):
        verify_manifest(out)
    victim.unlink()
    with pytest.raises(ConvertError, match=r"layers\.1\.distcp is missing"):
        verify_manifest(out)
    victim.write_bytes(sound)
    (out / "extra").touch()
    with pytest.raises(ConvertError, match="extra is not listed"):
        verify_manifest(out)


def test_progress_counts_every_weight_byte(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(ckpt, tmp_path / "quiet", progress=False)
    assert capsys.readouterr().err == ""
    convert(ckpt, tmp_path / "out")
    bytes_kib = sum(w.nbytes for w in random_weights(TINY_PARAMS).values()) / 1024
    bar = capsys.readouterr().err
    assert f"{bytes_kib:.0f}k/{bytes_kib:.0f}k" in bar
    assert "B/s]" in bar

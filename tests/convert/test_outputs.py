"""Every form of output: what was written, read back by other people's code; and all round trips, bit for bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.convert.reading import assert_same
from tests.helpers.shards import cut, random_weights, write_fairscale_checkpoint
from tpserve.cli.main import main
from tpserve.convert import source_tensor, weights, write_hf, write_meta
from tpserve.convert.convert import convert
from tpserve.convert.dcp_source import open_dcp
from tpserve.convert.errors import ConvertError
from tpserve.convert.manifest import verify_manifest
from tpserve.convert.meta_params import ffn_rule
from tpserve.convert.source import open_source
from tpserve.model.args import ModelArgs, ffn_hidden_dim
from tpserve.model.checkpoint import CheckpointError, CheckpointInfo
from tpserve.model.loader import load_model
from tpserve.model.parallel import TensorParallel
from tpserve.model.plan import shares

# Grouped-query attention with as many key/value heads as the largest model-parallel size; a width that 8 divides.
PARAMS: dict[str, Any] = {
    "dim": 64, "n_layers": 2, "n_heads": 16, "n_kv_heads": 8, "multiple_of": 8, "norm_eps": 1e-5, "vocab_size": 96,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that every matrix is read in several."""
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(source_tensor, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(write_meta, "_COLUMNS_BYTES", 2500)


def turn(folder: Path, name: str, format: str, mp: int | None = None, dtype: str | None = None) -> Path:
    """Converts, and looks at the manifest."""
    out = convert(folder, folder.parent / name, format=format, mp=mp, dtype=dtype, progress=False)
    verify_manifest(out)
    return out


def meta_weights(folder: Path) -> list[dict[str, Tensor]]:
    """Meta's shards as their code loads them."""
    return [torch.load(path, map_location="cpu", weights_only=True) for path in sorted(folder.glob("*.pth"))]


def assert_shards(folder: Path, expected: dict[str, Tensor], mp: int, embedding_dim: int = 1) -> None:
    shards = cut(expected, mp, embedding_dim)
    found = meta_weights(folder)
    assert len(found) == mp
    for shard, want in zip(found, shards, strict=True):
        del want["rope.freqs"]  # a buffer that Meta's code makes itself
        assert_same(shard, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_through_every_form(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = write_fairscale_checkpoint(tmp_path / "meta2", PARAMS, mp=2, dtype=dtype)
    dcp = turn(tmp_path / "meta2", "dcp", "dcp")
    safe = turn(dcp, "safetensors", "safetensors")
    hf = turn(safe, "hf", "hf")
    for mp, through in ((1, dcp), (2, hf), (4, safe), (8, hf)):
        assert_shards(turn(through, f"mp{mp}", "meta", mp), expected, mp)
    # Whatever it came through, a form's files are the same.
    again = turn(turn(tmp_path / "mp8", "dcp8", "dcp"), "safetensors8", "safetensors")
    for first, second in ((dcp, tmp_path / "dcp8"), (safe, again)):
        sums = [json.loads((folder / "manifest.json").read_text())["sha256"] for folder in (first, second)]
        for names in sums:
            del names["model.json"]  # names the number of shards
        assert sums[0] == sums[1]
    assert CheckpointInfo.read(again).args == CheckpointInfo.read(dcp).args


def test_hugging_face_s_own_reader_finds_the_weights_and_they_come_back(tmp_path: Path) -> None:
    expected = write_fairscale_checkpoint(tmp_path / "meta", PARAMS, mp=2)
    hf = turn(tmp_path / "meta", "hf", "hf")
    with safe_open(hf / "model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    assert set(found) == {write_hf.hf_name(name) for name in expected}
    for name, weight in expected.items():
        if name.endswith(("wq.weight", "wk.weight")):
            weight = weight.view(-1, 2, 2, 64).transpose(1, 2).reshape(weight.shape)
        assert torch.equal(found[write_hf.hf_name(name)], weight), name
    config = json.loads((hf / "config.json").read_text())
    assert (config["num_key_value_heads"], config["intermediate_size"]) == (8, 176)
    assert config["tie_word_embeddings"] is False


def test_hugging_face_s_index_of_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_hf, "MAX_SHARD_BYTES", 100_000)
    expected = write_fairscale_checkpoint(tmp_path / "meta", PARAMS, mp=1)
    hf = turn(tmp_path / "meta", "hf", "hf")
    index = json.loads((hf / write_hf.INDEX_FILE).read_text())
    files = sorted(path.name for path in hf.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    for name, file in index["weight_map"].items():
        with safe_open(hf / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - it is no dictionary


def test_meta_s_shards_are_files_of_torch_save(tmp_path: Path) -> None:
    expected = write_fairscale_checkpoint(tmp_path / "in", PARAMS, mp=1)
    out = turn(tmp_path / "in", "out", "meta", 2)
    whole = torch.load(out / "consolidated.01.pth", mmap=True, weights_only=True)
    assert_same(whole, {name: t for name, t in cut(expected, 2)[1].items() if name != "rope.freqs"})
    listed = dict(reversed(line.split()) for line in (out / "checklist.chk").read_text().splitlines())
    assert set(listed) == {"params.json", "consolidated.00.pth", "consolidated.01.pth"}
    for name, md5 in listed.items():
        assert hashlib.md5((out / name).read_bytes()).hexdigest() == md5
    (out / "checklist.chk").unlink()
    convert(out, tmp_path / "by-crc32", progress=False)  # the archive's own sums are right, too


def test_llama_3_s_embedding_is_cut_by_rows(tmp_path: Path) -> None:
    params = PARAMS | {"rope_theta": 500000.0, "use_scaled_rope": True}
    expected = write_fairscale_checkpoint(tmp_path / "in", params, mp=2, embedding_dim=0)
    out = turn(tmp_path / "in", "out", "meta", 4)
    assert_shards(out, expected, 4, embedding_dim=0)
    assert open_source(out).args == open_source(tmp_path / "in").args
    assert open_source(turn(turn(out, "hf", "hf"), "back", "meta", 2)).args == open_source(out).args
    assert json.loads((out / "params.json").read_text())["use_scaled_rope"] is True


@pytest.mark.parametrize(
    ("dim", "width"),
    [(4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016), (8192, 28672), (4096, 14336), (2048, 8192),
     (576, 1536), (64, 172), (32, 33), (96, 7), (2048, 5632), (100, 25000)],
)  # fmt: skip
def test_params_give_the_feed_forward_width(dim: int, width: int) -> None:
    assert ffn_hidden_dim(dim, *ffn_rule(dim, width)) == width


def test_params_of_the_models_that_everybody_has() -> None:
    assert ffn_rule(4096, 11008) == (256, None)
    assert ffn_rule(4096, 14336) == (256, 1.3)  # Meta's file says 1024: the same width
    assert ffn_rule(8192, 28672) == (4096, 1.3)


@pytest.mark.parametrize(
    ("mp", "said"),
    [(3, "--mp 3 does not divide n_heads (16); this model can be cut into 1, 2, 4, 8 parts"),
     (16, "--mp 16 does not divide n_kv_heads (8)"), (0, "--mp 0 does not divide n_heads")],
)  # fmt: skip
def test_a_size_that_does_not_divide(tmp_path: Path, mp: int, said: str) -> None:
    write_fairscale_checkpoint(tmp_path / "in", PARAMS, mp=1)
    with pytest.raises(ConvertError) as error:
        convert(tmp_path / "in", tmp_path / "out", format="meta", mp=mp, progress=False)
    assert str(error.value).startswith(said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("format", "mp", "said"), [("onnx", None, "--format onnx is not known"), ("hf", 2, "--mp is")])
def test_flags_that_do_not_fit(tmp_path: Path, format: str, mp: int | None, said: str) -> None:
    with pytest.raises(ConvertError, match=said):
        convert(tmp_path, tmp_path / "out", format=format, mp=mp, progress=False)


@pytest.mark.parametrize("tp", [1, 3, 16])
def test_ranks_read_safetensors_as_they_read_dcp(tmp_path: Path, tp: int) -> None:
    write_fairscale_checkpoint(tmp_path / "in", PARAMS, mp=2)
    folders = [turn(tmp_path / "in", format, format) for format in ("dcp", "safetensors")]
    for rank in {0, tp - 1}:
        dcp, safe = (load_model(folder, tp=TensorParallel(rank, tp)) for folder in folders)
        assert_same(dict(safe.model.state_dict()), dict(dcp.model.state_dict()))
        assert safe.bytes_read == dcp.bytes_read
        assert len(shares(safe.info.args, tp)) == tp


@pytest.mark.parametrize("name", ["layers.1.attention.wo.weight", "layers.1.attention.wq.weight", "norm.weight"])
def test_a_changed_byte_of_safetensors_is_found(tmp_path: Path, name: str) -> None:
    write_fairscale_checkpoint(tmp_path / "in", PARAMS, mp=1)
    folder = turn(tmp_path / "in", "out", "safetensors")
    path = folder / ("norm.safetensors" if name == "norm.weight" else "layers.1.safetensors")
    data = bytearray(path.read_bytes())
    with safe_open(path, "pt") as file:
        value = file.get_tensor(name).flatten()[5:6].numpy().tobytes()
    data[data.index(value)] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged .* CRC-32 of {name}"):
        load_model(folder)
    with pytest.raises(ConvertError, match=rf"{path.name} is damaged .* CRC-32 of {name}"):
        convert(folder, tmp_path / "again", format="hf", progress=False)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"\x40" + b"\0" * 7 + b'{"norm.weight": 1}'.ljust(64)]
)
def test_a_file_that_is_no_safetensors(tmp_path: Path, content: bytes) -> None:
    write_fairscale_checkpoint(tmp_path / "in", PARAMS, mp=1)
    folder = turn(tmp_path / "in", "out", "safetensors")
    (folder / "norm.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"norm\.safetensors"):
        load_model(folder)
    with pytest.raises(ConvertError, match=r"norm\.safetensors"):
        open_dcp(folder)


def test_float16_that_cannot_hold_a_value(tmp_path: Path) -> None:
    write_fairscale_checkpoint(tmp_path / "in", PARAMS, mp=1)
    shard = torch.load(tmp_path / "in" / "consolidated.00.pth", weights_only=True)
    shard["layers.1.feed_forward.w2.weight"][3, 3] = 1e6
    torch.save(shard, tmp_path / "in" / "consolidated.00.pth")
    for format in ("dcp", "safetensors", "hf", "meta"):
        with pytest.raises(ConvertError, match=r"layers\.1\.feed_forward\.w2\.weight has values that float16"):
            convert(tmp_path / "in", tmp_path / "out", format=format, dtype="fp16", progress=False)
        assert not (tmp_path / "out").exists()


def test_the_tied_head_is_left_out_and_comes_back(tmp_path: Path) -> None:
    expected = random_weights(PARAMS)
    expected["output.weight"] = expected["tok_embeddings.weight"].clone()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "params.json").write_text(json.dumps(PARAMS))
    torch.save(expected, tmp_path / "in" / "consolidated.00.pth")
    hf = turn(tmp_path / "in", "hf", "hf")
    assert json.loads((hf / "config.json").read_text())["tie_word_embeddings"] is True
    with safe_open(hf / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - it is no dictionary
    assert_shards(turn(hf, "back", "meta", 4), expected, 4)


def test_args_survive(tmp_path: Path) -> None:
    params = PARAMS | {"rope_theta": 1e6, "norm_eps": 1e-6, "n_kv_heads": 16, "ffn_dim_multiplier": 1.3}
    write_fairscale_checkpoint(tmp_path / "in", params, mp=1)
    out = turn(turn(tmp_path / "in", "hf", "hf"), "out", "meta")
    assert open_source(out).args == ModelArgs.from_params(params)


@pytest.mark.parametrize("flags", [["--from", "--to"], ["--ckpt_dir", "--out_dir"]])
def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    write_fairscale_checkpoint(tmp_path / "3", PARAMS, mp=2)
    monkeypatch.chdir(tmp_path)  # in which both folders have names that look like numbers
    arguments = [f"{flags[0]}=3", flags[1], "7", "--format", "meta", "--mp", "4"]
    monkeypatch.setattr("sys.argv", ["tpserve", "convert", *arguments])
    main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "7")
    assert len(meta_weights(tmp_path / "7")) == 4

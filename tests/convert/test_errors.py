"""Whatever is wrong with a checkpoint is said before anything is written, with the name of the file and of the key."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.shards import TINY_PARAMS, write_fairscale_checkpoint
from tpserve.convert.convert import convert
from tpserve.convert.errors import ConvertError
from tpserve.convert.tokenizer import find_tokenizer

S0, S1 = "consolidated.00.pth", "consolidated.01.pth"
WQ = "layers.1.attention.wq.weight"


def edit(folder: Path, name: str, change: Callable[[dict[str, object]], object]) -> None:
    shard = torch.load(folder / name, weights_only=True)
    change(shard)
    torch.save(shard, folder / name)


def put(name: str, key: str, value: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, name, lambda shard: shard.update({key: value}))


def drop(name: str, key: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, name, lambda shard: shard.pop(key))


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def params(**fields: object) -> Callable[[Path], object]:
    return write("params.json", json.dumps(TINY_PARAMS | fields).encode())


def truncate(folder: Path) -> None:
    os.truncate(folder / S1, (folder / S1).stat().st_size * 2 // 3)


def foreign_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / S1, "w") as archive:
        archive.writestr("word/document.xml", "hello")


def save(name: str, value: object) -> Callable[[Path], None]:
    return lambda folder: torch.save(value, folder / name)


def compressed(folder: Path) -> None:
    """A shard zipped again by a well-meaning person: its tensors cannot be mapped."""
    with zipfile.ZipFile(folder / S1) as old:
        records = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(folder / S1, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in records:
            new.writestr(name, data)


def big_endian(folder: Path) -> None:
    with zipfile.ZipFile(folder / S1) as old:
        records = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(folder / S1, "w") as new:
        for name, data in records:
            new.writestr(name, b"big" if name.endswith("/byteorder") else data)


def another_model(seed: int, **fields: object) -> Callable[[Path], None]:
    """The second shard comes from another checkpoint."""

    def change(folder: Path) -> None:
        other = folder.parent.parent / "other"
        write_fairscale_checkpoint(other, TINY_PARAMS | fields, seed=seed)
        (other / S1).replace(folder / S1)
        for path in other.iterdir():
            path.unlink()
        other.rmdir()

    return change


def checklist(**changed: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        names = (S0, S1, "params.json")
        sums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in names} | changed
        lines = [f"{value}  {name.replace('_', '.')}\n" for name, value in sums.items()]
        (folder / "checklist.chk").write_text("".join(lines))

    return change


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


HTML = b"\n<!DOCTYPE html>\n<html><body>404</body></html>"

# what is done to a sound checkpoint → what the message must say
CASES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "unknown key": (put(S1, "layers.1.attention.wx.weight", torch.ones(2)), [S1, "layers.1.attention.wx.weight"]),
    "unknown bias": (put(S0, "layers.0.attention.wq.bias", torch.ones(16)), [S0, "layers.0.attention.wq.bias"]),
    "hf name": (put(S0, "model.layers.0.mlp.up_proj.weight", torch.ones(2)), [S0, "model.layers.0.mlp.up_proj"]),
    "odd layer": (put(S0, "layers.x.attention.wq.weight", torch.ones(2)), [S0, "layers.x.attention.wq.weight"]),
    "missing key": (drop(S1, WQ), [S1, WQ, "is missing"]),
    "no embedding": (drop(S0, "tok_embeddings.weight"), [S0, "tok_embeddings.weight", "is missing"]),
    "too few layers": (params(n_layers=10**9), [S0, "layers.2.attention.wq.weight is missing", "params.json"]),
    "too many layers": (params(n_layers=1), [S0, "layers.1.", "is not a weight of this model", "1 layers"]),
    "shape of one shard": (put(S1, WQ, torch.ones(16, 31)), [S1, WQ, "16 x 31", "16 x 32"]),
    "params: dim": (params(dim=48), [S0, "tok_embeddings.weight", "90 x 16", "dim 48", "2 shards"]),
    "params: ffn": (params(multiple_of=32), [S0, "feed_forward.w1.weight", "44 x 32", "48 x 32", "params.json"]),
    "params: odd ffn": (params(multiple_of=5), [S0, "feed_forward.w1.weight", "85 x 32", "equal parts"]),
    "params: kv heads": (params(n_kv_heads=4), [S0, "layers.0.attention.wk.weight", "8 x 32", "16 x 32"]),
    "params: vocabulary": (params(vocab_size=100), ["params.json", "100", "90"]),
    "params: unknown field": (params(n_head=4), ["params.json", "'n_head'", "'n_heads'"]),
    "params: field missing": (write("params.json", b'{"dim": 32, "n_layers": 2}'), ["params.json", "n_heads"]),
    "params: not JSON": (write("params.json", b"{dim: 32}"), ["params.json", "not JSON"]),
    "params: a list": (write("params.json", b"[32]"), ["params.json", "list"]),
    "params: HTML": (write("params.json", HTML), ["params.json", "HTML page", "download it again"]),
    "params: missing": (lambda d: (d / "params.json").unlink(), ["params.json is missing"]),
    "another model's shapes": (another_model(0, n_kv_heads=4), [S1, "layers.0.attention.wk.weight", "16 x 32"]),
    "another model's values": (another_model(5), [S1, "layers.0.attention_norm.weight differs", S0]),
    "truncated": (truncate, [S1, "is truncated"]),
    "empty": (write(S0, b""), [S0, "is empty"]),
    "HTML": (write(S1, HTML), [S1, "HTML page", "download it again"]),
    "XML": (write(S1, b"<?xml version='1.0'?><Error>AccessDenied</Error>"), [S1, "XML", "expired"]),
    "lfs pointer": (write(S1, b"version https://git-lfs.github.com/spec/v1\noid"), [S1, "git lfs pull"]),
    "text": (write(S1, b"hello, this is text"), [S1, "not a torch checkpoint", "hello, this is"]),
    "plain pickle": (write(S1, pickle.dumps({"a": 1})), [S1, "a pickle that torch.save did not write"]),
    "foreign zip": (foreign_zip, [S1, "not a torch checkpoint", "data.pkl"]),
    "big-endian": (big_endian, [S1, "big-endian"]),
    "compressed": (compressed, [S1, "compressed", "save it again"]),
    "hostile pickle": (save(S1, {"w": Hostile()}), [S1, "mkdir", "not executed"]),
    "module": (save(S1, torch.nn.Linear(2, 2)), [S1, "Linear", "not executed"]),
    "a tensor": (save(S1, torch.ones(3)), [S1, "holds a Tensor"]),
    "nested": (save(S1, {"model": {"w": torch.ones(3)}, "step": 7}), [S1, "'model'", "dict", "training checkpoint"]),
    "number as key": (save(S1, {3: torch.ones(3)}), [S1, "key 3 is a int"]),
    "not a tensor": (put(S1, "norm.weight", [1.0] * 32), [S1, "'norm.weight'", "list"]),
    "integers": (put(S1, "norm.weight", torch.ones(32, dtype=torch.int8)), [S1, "norm.weight", "torch.int8"]),
    "sparse": (put(S1, "norm.weight", torch.ones(32).to_sparse()), [S1, "norm.weight", "dense"]),
    "scalar": (put(S0, "tok_embeddings.weight", torch.ones(())), [S0, "tok_embeddings.weight", "scalar"]),
    "gap": (lambda d: (d / S1).rename(d / "consolidated.02.pth"), [f"{S1} is missing", "02"]),
    "first missing": (lambda d: (d / S0).unlink(), [f"{S0} is missing"]),
    "last missing": (lambda d: (d / S1).unlink(), [S0, "some of 2 shards missing"]),
    "no shards": (
        lambda d: [p.unlink() for p in d.glob("*.pth")],
        ["llama-tiny holds no checkpoint", "params.json, but no weights"],
    ),
    "checklist: shard": (checklist(consolidated_01_pth="0" * 32), [S1, "damaged", "0" * 32, "checklist.chk"]),
    "checklist: params": (checklist(params_json="1" * 32), ["params.json is damaged", "1" * 32]),
    "checklist: missing shard": (checklist(consolidated_02_pth="2" * 32), ["consolidated.02.pth is missing"]),
    "checklist: garbage": (write("checklist.chk", b"\nnonsense\n"), ["checklist.chk: line 2", "nonsense"]),
    "checklist: a path": (write("checklist.chk", b"1" * 32 + b"  ../x\n"), ["checklist.chk: line 1"]),
    "checklist: HTML": (write("checklist.chk", HTML), ["checklist.chk", "HTML page"]),
    "tokenizer: garbage": (write("tokenizer.model", b"garbage" * 9), ["tokenizer.model is not a SentencePiece model"]),
    "tokenizer: empty": (write("tokenizer.model", b""), ["tokenizer.model is empty"]),
    "tokenizer: HTML": (write("tokenizer.model", HTML), ["tokenizer.model", "HTML page"]),
}


@pytest.mark.parametrize("case", CASES)
def test_error_names_file_and_key_and_nothing_is_written(
    case: str,
    ckpt: Path,
    tmp_path: Path,
    snapshot: Callable[[Path], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    change, said = CASES[case]
    change(ckpt)
    before = snapshot(tmp_path)
    with pytest.raises(ConvertError) as error:
        convert(ckpt, tmp_path / "out", progress=False)
    for words in said:
        assert words in str(error.value)
    assert snapshot(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_the_checkpoint_of_these_cases_is_sound(ckpt: Path, tmp_path: Path) -> None:
    checklist()(ckpt)
    assert convert(ckpt, tmp_path / "out", progress=False).is_dir()


@pytest.mark.parametrize("name", ["tensor", "folder"])
def test_source_that_is_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConvertError, match=f"{name} (is not a .gguf file|does not exist)"):
        convert(tmp_path / name, tmp_path / "out", progress=False)


def test_a_hugging_face_folder_without_its_config(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ConvertError, match=r"model-00001-of-00002\.safetensors, but no config\.json"):
        convert(tmp_path / "hf", tmp_path / "out", progress=False)


def test_unknown_dtype_and_wrong_number_of_shards(ckpt: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="--dtype int8 is not known"):
        convert(ckpt, tmp_path / "out", dtype="int8", progress=False)
    with pytest.raises(ConvertError, match=r"--model_parallel_size is 8, but .* holds 2 shards"):
        convert(ckpt, tmp_path / "out", model_parallel_size=8, progress=False)
    assert not (tmp_path / "out").exists()


def test_unreadable_shard(ckpt: Path, tmp_path: Path) -> None:
    (ckpt / S1).unlink()
    (ckpt / S1).mkdir()
    with pytest.raises(ConvertError, match=S1):
        convert(ckpt, tmp_path / "out", progress=False)


@pytest.mark.parametrize("where", ["named", "beside", "above"])
def test_tokenizer_is_found_checked_and_copied(ckpt: Path, tmp_path: Path, tokenizer_model: bytes, where: str) -> None:
    path = {"named": tmp_path / "t.model", "beside": ckpt / "tokenizer.model", "above": ckpt.parent / "tokenizer.model"}
    path[where].write_bytes(tokenizer_model)
    out = convert(ckpt, tmp_path / "out", path[where] if where == "named" else None, progress=False)
    assert (out / "tokenizer.model").read_bytes() == tokenizer_model
    info = json.loads((out / "model.json").read_text())
    assert (info["tokenizer"], info["bos_token_id"], info["eos_token_id"]) == ("tokenizer.model", 1, 2)


def test_tokenizer_of_another_model(tmp_path: Path, tokenizer_model: bytes) -> None:
    write_fairscale_checkpoint(tmp_path / "in", TINY_PARAMS | {"vocab_size": 38})
    (tmp_path / "t.model").write_bytes(tokenizer_model)
    with pytest.raises(ConvertError, match=r"t\.model has 40 pieces, but the model's embedding has 38 rows"):
        convert(tmp_path / "in", tmp_path / "out", tmp_path / "t.model", progress=False)
    with pytest.raises(ConvertError, match=r"none\.model does not exist"):
        convert(tmp_path / "in", tmp_path / "out", tmp_path / "none.model", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_damaged_llama_3_tokenizer_is_told(ckpt: Path, tmp_path: Path) -> None:
    (ckpt / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(ConvertError, match=r"tokenizer\.model has no token for some bytes"):
        convert(ckpt, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_no_tokenizer_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find_tokenizer(tmp_path, None, 90) is None
    assert "token-id prompts only" in caplog.text

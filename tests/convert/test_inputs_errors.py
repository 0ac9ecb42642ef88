"""What cannot be read is refused before memory is taken for it, with the name of the file and of the key."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.convert.test_inputs import LLAMA3, PARAMS
from tests.helpers.foreign import hf_config, hf_weights, write_gguf, write_hf, write_legacy_dcp
from tests.helpers.shards import random_weights
from tpserve.convert.describe import describe
from tpserve.convert.errors import ConvertError
from tpserve.convert.gguf_header import read_gguf_header
from tpserve.convert.open_any import open_any
from tpserve.convert.safetensors_header import read_header

META = random_weights(PARAMS)
Q = "model.layers.1.self_attn.q_proj.weight"


def refused(path: Path, *said: str) -> None:
    with pytest.raises(ConvertError) as error:
        open_any(path)
    for text in said:
        assert text in str(error.value)


CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another architecture": ({"architectures": ["Qwen2ForCausalLM"]}, ["architectures", "Qwen2ForCausalLM"]),
    "a window": ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, ["sliding_window", "4096"]),
    "bias in attention": ({"attention_bias": True}, ["attention_bias"]),
    "bias in the MLP": ({"mlp_bias": True}, ["mlp_bias"]),
    "wide heads": ({"head_dim": 64}, ["head_dim is 64", "is 32"]),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "'linear'"]),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'"]),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["'yarn'"]),
    "llama3 without a factor": ({"rope_scaling": LLAMA3 | {"factor": None}}, ["factor must be a positive number"]),
    "llama3, low is high": ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, ["low_freq_factor must be below"]),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq", "unquantised"]),
    "GELU": ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
    "another width": ({"intermediate_size": 400}, ["mlp.gate_proj.weight", "352 x 128", "400 x 128", "config.json"]),
    "heads": ({"num_attention_heads": 3}, ["config.json", "n_heads (3)"]),
    "no vocabulary": ({"vocab_size": None}, ["config.json", "vocab_size"]),
    "larger vocabulary": ({"vocab_size": 97}, ["model.embed_tokens.weight", "96 x 128", "97 x 128"]),
    "layers": ({"num_hidden_layers": 10**9}, ["model.layers.2.", "is missing"]),
    "fewer layers": ({"num_hidden_layers": 1}, ["model.layers.1.", "is not a weight of this model"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_of_another_network(tmp_path: Path, case: str) -> None:
    more, said = CONFIGS[case]
    write_hf(tmp_path, hf_weights(META, 32), hf_config(PARAMS, META, **more))
    refused(tmp_path, *said)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_weights_that_are_missing_or_too_many(tmp_path: Path, form: str) -> None:
    for name, change, said in (
        ("missing", lambda w: w.pop(Q), [Q, "is missing"]),
        ("bias", lambda w: w.update({Q[:-6] + "bias": torch.ones(128)}), [Q[:-6] + "bias", "biases"]),
        ("type", lambda w: w.update({Q: w[Q].double()}), [Q]),
    ):
        weights = hf_weights(META, 32)
        change(weights)
        write_hf(tmp_path / name, weights, hf_config(PARAMS, META), form=form)
        refused(tmp_path / name, *said)


def test_an_index_that_lies(tmp_path: Path) -> None:
    write_hf(tmp_path, hf_weights(META, 32), hf_config(PARAMS, META), num_files=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {Q: "../../etc/passwd"}}))
    refused(tmp_path, str(index), "../../etc/passwd", "no file of this folder")
    index.write_text(json.dumps({"weight_map": {Q: "model-00003-of-00003.safetensors"}}))
    refused(tmp_path, "model-00003-of-00003.safetensors is missing", index.name)
    index.write_text("<html>not found</html>")
    refused(tmp_path, str(index), "HTML")
    index.unlink()
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "model-00001-of-00002.safetensors").read_bytes())
    refused(tmp_path, "is in copy.safetensors, too")


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def test_nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_hf(tmp_path / "bin", {}, hf_config(PARAMS, META), form="bin")
    torch.save({Q: Hostile()}, tmp_path / "bin" / "pytorch_model.bin")
    write_legacy_dcp(tmp_path / "old", META)
    (tmp_path / "old" / "model_args.json").write_text(json.dumps(PARAMS))
    (tmp_path / "old" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    for folder, name in (("bin", "pytorch_model.bin"), ("old", ".metadata")):
        refused(tmp_path / folder, name)
        with pytest.raises(ConvertError, match=r"mkdir.*not executed"):
            describe(tmp_path / folder)
    assert not (tmp_path / "executed").exists()


def test_the_old_example_without_its_arguments(tmp_path: Path) -> None:
    write_legacy_dcp(tmp_path / "run" / "old", META)
    refused(tmp_path / "run" / "old", "model_args.json", "where it was started", "copy it to")
    (tmp_path / "run" / "old" / "model_args.json").write_text(json.dumps(PARAMS | {"multiple_of": 512}))
    refused(tmp_path / "run" / "old", "feed_forward.w1.weight", "352 x 128", "512 x 128", "model_args.json")
    (tmp_path / "run" / "old" / "model_args.json").write_text(json.dumps(PARAMS))
    (tmp_path / "run" / "old" / "__1_0.distcp").unlink()
    with pytest.raises(ConvertError, match=r"__1_0\.distcp"):
        open_any(tmp_path / "run" / "old").tensors[1].read(0, 0, 128, torch.float32)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path, "looked for", "consolidated.NN.pth", "*.safetensors", "*.gguf", ".metadata")
    refused(tmp_path / "nowhere", "does not exist")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "config.json, but no weights")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "model.safetensors", "one file of a checkpoint", str(tmp_path))
    refused(tmp_path, "config.json", "architectures")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "looked for")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / name).write_bytes(b"GGUF")
    refused(tmp_path / "two", "a.gguf, b.gguf", "name the one file")
    part = tmp_path / "big-00001-of-00002.gguf"
    part.write_bytes(b"GGUF")
    refused(part, "one of several parts", "llama-gguf-split --merge")


GGUFS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "architecture": ({"architecture": "qwen2"}, ["general.architecture", "'qwen2'"]),
    "experts": ({"more": {"llama.expert_count": 8}}, ["llama.expert_count", "8"]),
    "scaling": ({"more": {"llama.rope.scaling.type": "yarn"}}, ["llama.rope.scaling.type", "'yarn'"]),
    "wide heads": ({"more": {"llama.attention.key_length": 64}}, ["llama.attention.key_length", "64", "32"]),
    "larger vocabulary": ({"more": {"llama.vocab_size": 97}}, ["llama.vocab_size", "97", "96"]),
    "other factors": ({"rope_factors": np.linspace(1, 4, 16)}, ["rope_freqs.weight", "Llama 3.1"]),
    "factors of other heads": ({"rope_factors": np.ones(7)}, ["rope_freqs.weight", "(16,)"]),
}


@pytest.mark.parametrize("case", GGUFS)
def test_a_gguf_of_another_network(tmp_path: Path, case: str) -> None:
    more, said = GGUFS[case]
    write_gguf(tmp_path / "model.gguf", PARAMS, META, **more)
    refused(tmp_path / "model.gguf", "model.gguf", *said)


def test_a_gguf_that_lacks_weights(tmp_path: Path) -> None:
    weights = {name: w for name, w in META.items() if "layers.1.attention.wq" not in name}
    write_gguf(tmp_path / "a.gguf", PARAMS, weights)
    refused(tmp_path / "a.gguf", "blk.1.attn_q.weight is missing")
    write_gguf(tmp_path / "b.gguf", PARAMS | {"n_layers": 1}, META)
    refused(tmp_path / "b.gguf", "blk.1.", "is not a weight of this model")
    write_gguf(tmp_path / "c.gguf", PARAMS, META | {"norm.weight": torch.ones(64)})
    refused(tmp_path / "c.gguf", "output_norm.weight", "64", "128")


def with_header(header: object, data_bytes: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "length": (struct.pack("<Q", 1 << 62) + b"{}", "truncated"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
    "no JSON": (with_header(b"{{{"), "damaged header"),
    "deep": (with_header(b"[" * 100_000), "damaged header"),
    "a list": (with_header([1]), "no JSON object"),
    "no entry": (with_header({"x": 3}), "entry of x"),
    "type": (with_header(entry(dtype="C64")), "C64"),
    "type is a list": (with_header(entry(dtype=["F32"])), "F32"),
    "negative": (with_header(entry(offsets=[-8, 0])), "not known"),
    "huge": (with_header(entry(shape=[1 << 40, 1 << 40])), "contradicts itself"),
    "beyond": (with_header(entry(shape=[4], offsets=[0, 16])), "truncated"),
    "size": (with_header(entry(shape=[1])), "contradicts itself"),
    "overlap": (with_header(entry() | {"y": entry()["x"]}), "overlaps"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_damaged_safetensors(tmp_path: Path, case: str) -> None:
    data, said = SAFETENSORS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ConvertError) as error:
        read_header(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, PARAMS, META, "Q8_0", more={"tokenizer.ggml.model": "llama"})
    return path.read_bytes()


def test_damaged_gguf(tmp_path: Path, gguf_bytes: bytes) -> None:
    head = gguf_bytes[:8]
    cases: dict[str, tuple[bytes, str]] = {
        "html": (b"<html></html>", "HTML"),
        "version": (b"GGUF" + struct.pack("<I", 9) + gguf_bytes[8:], "version 9"),
        "big-endian": (b"GGUF" + struct.pack(">I", 3) + gguf_bytes[8:], "big-endian"),
        "tensors": (head + struct.pack("<QQ", 1 << 60, 1) + gguf_bytes[24:], "damaged header"),
        "keys": (head + struct.pack("<QQ", 1, 1 << 60) + gguf_bytes[24:], "damaged header"),
        "name": (head + struct.pack("<QQQ", 0, 1, 1 << 50), "a name of"),
        "text": (head + struct.pack("<QQQ1sIQ", 0, 1, 1, b"k", 8, 1 << 50), "a text of"),
        "array": (head + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 4, 1 << 61), "an array of"),
        "array of arrays": (head + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 9, 1), "an array of"),
        "kind": (head + struct.pack("<QQQ1sI", 0, 1, 1, b"k", 99), "a value of type 99"),
        "half": (gguf_bytes[: len(gguf_bytes) // 2], "truncated"),
        "head": (gguf_bytes[:100], "truncated"),
    }
    for name, (data, said) in cases.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        refused(path, said, path.name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_to_a_gguf_header_is_refused_or_harmless(
    tmp_path: Path, gguf_bytes: bytes, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(gguf_bytes)
    for position, value in changes:
        data[position] = value
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    try:
        header = read_gguf_header(path)
        for key in header.metadata:
            if not isinstance(header.metadata[key], int | float | str):
                header.array(key)
        open_any(path)
    except ConvertError as e:
        assert "model.gguf" in str(e)  # noqa: PT017 - most damage is harmless

"""Files that are damaged, exchanged or another model's: refused with their names, by the converter and by ranks."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults import checkpoints
from tests.faults.checkpoints import LAYER, cut_off, edit_json, edit_metadata, exchange, flip, make, weights_digest
from tests.helpers.shards import write_fairscale_checkpoint
from tpserve.convert.convert import convert
from tpserve.convert.errors import ConvertError
from tpserve.model.checkpoint import CheckpointError
from tpserve.model.loader import load_model

S0, S1 = "consolidated.00.pth", "consolidated.01.pth"
WQ = "layers.1.attention.wq.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sound checkpoint, as Meta's files and converted; never written to."""
    return make(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Another one of the same shape."""
    return make(tmp_path_factory.mktemp("other"), seed=7)


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One of another shape, with the same names."""
    return make(tmp_path_factory.mktemp("wider"), n_kv_heads=4)


@pytest.fixture
def folder(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "model"))


@pytest.fixture
def source(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "source"))


def stored_dtype(metadata: Any) -> None:
    for tensor in metadata.state_dict_metadata.values():
        tensor.properties.dtype = torch.float16


def one_dtype(metadata: Any) -> None:
    metadata.state_dict_metadata[WQ].properties.dtype = torch.int32


def elsewhere(metadata: Any) -> None:
    for where in metadata.storage_data.values():
        where.relative_path = "../other/" + where.relative_path


def beyond(metadata: Any) -> None:
    next(w for w in metadata.storage_data.values() if w.relative_path == LAYER).offset = 10**12


def lost(metadata: Any) -> None:
    metadata.storage_data = {i: w for i, w in metadata.storage_data.items() if i.fqn != WQ}


Change = Callable[[Path], object]

# what is done to a sound folder → what the refusal must say
DAMAGE: dict[str, tuple[Change, list[str]]] = {
    "layer truncated": (lambda d: cut_off(d / LAYER), [LAYER, "bytes", "manifest.json says", "again"]),
    "layer empty": (lambda d: (d / LAYER).write_bytes(b""), [LAYER, "0 bytes", "again"]),
    "layer missing": (lambda d: (d / LAYER).unlink(), [LAYER, "no file", "again"]),
    "layer is a folder": (lambda d: ((d / LAYER).unlink(), (d / LAYER).mkdir()), [LAYER, "no file"]),
    "a weight's bit": (lambda d: flip(d / LAYER, 900), [LAYER, "layers.1.attention.", "CRC-32", "again"]),
    "layers exchanged": (lambda d: exchange(d, "layers.0.distcp", LAYER), ["layers.0.distcp", "another layer"]),
    "manifest missing": (lambda d: (d / "manifest.json").unlink(), ["manifest.json does not exist", "again"]),
    "manifest truncated": (lambda d: cut_off(d / "manifest.json"), ["manifest.json is damaged", "again"]),
    "manifest is a list": (lambda d: (d / "manifest.json").write_text("[]"), ["manifest.json is damaged"]),
    "metadata truncated": (lambda d: cut_off(d / ".metadata"), [".metadata is damaged", "again"]),
    "model.json truncated": (lambda d: cut_off(d / "model.json"), ["model.json is not JSON", "again"]),
    "model.json nested": (lambda d: (d / "model.json").write_text("[" * 10**5), ["model.json is not JSON"]),
    "model.json number": (lambda d: (d / "model.json").write_text("1" * 5000), ["model.json is not JSON"]),
    "another eos": (lambda d: edit_json(d / "model.json", eos_token_id=5), ["model.json", "manifest.json says"]),
    "tokenizer truncated": (lambda d: cut_off(d / "tokenizer.model"), ["tokenizer.model", "bytes", "again"]),
    "tokenizer's bit": (lambda d: flip(d / "tokenizer.model", 99), ["tokenizer.model", "SHA-256", "again"]),
    "declared dtype": (lambda d: edit_json(d / "model.json", dtype="float16"), [".metadata", "float32", "float16"]),
    "stored dtype": (lambda d: edit_metadata(d, stored_dtype), [".metadata", "float16", "makes it torch.float32"]),
    "one tensor's dtype": (lambda d: edit_metadata(d, one_dtype), [".metadata", WQ, "int32", "float32"]),
    "files elsewhere": (lambda d: edit_metadata(d, elsewhere), [".metadata", "manifest.json says"]),
    "a chunk beyond the end": (lambda d: edit_metadata(d, beyond), [".metadata"]),
    "a chunk without a place": (lambda d: edit_metadata(d, lost), [".metadata"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused(case: str, folder: Path) -> None:
    change, said = DAMAGE[case]
    change(folder)
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    for words in said:
        assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [elsewhere, beyond, lost, one_dtype])
def test_metadata_that_lies_is_refused_whatever_the_manifest_says(change: Any, folder: Path) -> None:
    edit_metadata(folder, change)
    checkpoints.sign(folder)
    with pytest.raises(CheckpointError, match=r"metadata|distcp"):
        load_model(folder)


@pytest.mark.parametrize("name", [LAYER, ".metadata", "model.json", "tokenizer.model", "manifest.json"])
def test_a_file_of_another_model_is_refused(name: str, folder: Path, other: tuple[Path, Path]) -> None:
    if name == "tokenizer.model":  # the other model has the same
        (folder / name).write_bytes((other[1] / name).read_bytes() + b"\0")
    elif name in (".metadata", "model.json"):
        assert (folder / name).read_bytes() == (other[1] / name).read_bytes()
        return  # what it says is true of both
    else:
        shutil.copy(other[1] / name, folder / name)
    with pytest.raises(CheckpointError, match=r"again"):
        load_model(folder)


@pytest.mark.parametrize("name", [LAYER, ".metadata", "model.json", "manifest.json"])
def test_a_file_of_a_model_of_another_shape_is_refused(name: str, folder: Path, wider: tuple[Path, Path]) -> None:
    shutil.copy(wider[1] / name, folder / name)
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    if name in (".metadata", "model.json"):
        for words in ("layers.0.attention.wk.weight", "(16, 32)", "(32, 32)", "model.json", "again"):
            assert words in str(error.value)


@pytest.mark.parametrize(("field", "value"), [("n_layers", 1), ("n_layers", 10**9), ("ffn_hidden_dim", 2**62)])
def test_a_model_json_that_does_not_fit_is_refused_before_a_network_is_made(
    folder: Path, field: str, value: int
) -> None:
    fields = json.loads((folder / "model.json").read_text())
    edit_json(folder / "model.json", args=fields["args"] | {field: value})
    with pytest.raises(CheckpointError, match=r"model\.json"):
        load_model(folder)


def test_no_flipped_bit_changes_a_weight(folder: Path, made: tuple[Path, Path]) -> None:
    rng, expected = random.Random(3), weights_digest(made[1])
    files = sorted(folder.iterdir())
    for _ in range(40):
        path = rng.choice(files)
        sound = path.read_bytes()
        flip(path, rng.randrange(len(sound)), rng.randrange(8))
        try:
            found = weights_digest(folder)
        except CheckpointError:
            pass
        else:
            assert path.name == "manifest.json"  # a space, or an A that was an a
            assert found == expected
        path.write_bytes(sound)


def test_folders_of_earlier_releases_are_held_against_whole_files(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["crc32"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    load_model(folder)
    flip(folder / LAYER, 900)
    with pytest.raises(CheckpointError, match=r"layers\.1\.distcp is not the file that was written"):
        load_model(folder)


def save_again(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    shard = torch.load(path, weights_only=True)
    change(shard)
    torch.save(shard, path)


def middle_bit(folder: Path) -> None:
    """In the weights, which are by far the most of a shard."""
    data = (folder / S1).read_bytes()
    shard = torch.load(folder / S1, weights_only=True)
    flip(folder / S1, data.index(shard[WQ].numpy().tobytes()) + 40)


SOURCES: dict[str, tuple[Change, list[str]]] = {
    "truncated": (lambda d: cut_off(d / S1), [S1, "truncated", "download it again"]),
    "a weight's bit": (middle_bit, [S1, WQ, "CRC-32", "download it again"]),
    "shards exchanged": (lambda d: exchange(d, S0, S1), [S0, "written as consolidated.01.pth", "exchanged"]),
    "a shard twice": (lambda d: shutil.copy(d / S0, d / S1), [S1, "written as consolidated.00.pth"]),
    "dtype of one shard": (lambda d: save_again(d / S1, lambda s: s.update({WQ: s[WQ].half()})), [S1, WQ, "float16"]),
    "integers": (lambda d: save_again(d / S1, lambda s: s.update({WQ: s[WQ].int()})), [S1, WQ, "torch.int32"]),
    "params nested": (lambda d: (d / "params.json").write_text("[" * 10**5), ["params.json is not JSON"]),
    "params number": (lambda d: (d / "params.json").write_text("1" * 5000), ["params.json is not JSON"]),
    "tokenizer's end": (lambda d: cut_off(d / "tokenizer.model"), ["tokenizer.model is not a SentencePiece model"]),
}


@pytest.mark.parametrize("case", SOURCES)
def test_damaged_shards_are_refused_before_anything_is_written(case: str, source: Path, tmp_path: Path) -> None:
    change, said = SOURCES[case]
    change(source)
    with pytest.raises(ConvertError) as error:
        convert(source, tmp_path / "new" / "out", progress=False)
    for words in said:
        assert words in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["params.json", S1])
def test_shards_of_a_model_of_another_shape(name: str, source: Path, wider: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copy(wider[0] / name, source / name)
    with pytest.raises(ConvertError, match=r"layers\.0\.attention\.wk\.weight is .* wrong params.json or wrong shard"):
        convert(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_no_flipped_bit_of_a_shard_changes_a_weight(source: Path, made: tuple[Path, Path], tmp_path: Path) -> None:
    rng, expected = random.Random(5), weights_digest(made[1])
    sound = (source / S1).read_bytes()
    num_refused = 0
    for i in range(25):
        flip(source / S1, rng.randrange(len(sound)), rng.randrange(8))
        try:
            out = convert(source, tmp_path / f"out{i}", progress=False)
        except ConvertError:
            num_refused += 1
            assert not (tmp_path / f"out{i}").exists()
        else:
            assert weights_digest(out) == expected  # padding, or a time stamp
        (source / S1).write_bytes(sound)
    assert num_refused > 10


def test_old_shards_without_sums_still_convert(tmp_path: Path) -> None:
    write_fairscale_checkpoint(tmp_path / "in")
    for path in (tmp_path / "in").glob("*.pth"):
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    assert convert(tmp_path / "in", tmp_path / "out", progress=False).is_dir()

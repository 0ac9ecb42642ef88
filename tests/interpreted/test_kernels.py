"""Kernels of the GPU path, on a CPU: see `checks.py`."""

from __future__ import annotations

import pytest

from tests.interpreted.beside import TIMEOUT_S, found_by
from tests.interpreted.checks import CHECKS

pytestmark = pytest.mark.timeout(TIMEOUT_S + 60)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By check, what went wrong."""
    out = tmp_path_factory.mktemp("interpreted") / "found.json"
    told: dict[str, str] = found_by("checks", out, {"TRITON_INTERPRET": "1"})
    return told


@pytest.mark.parametrize("check", CHECKS)
def test_kernels_are_what_torch_computes(found: dict[str, str], check: str) -> None:
    assert not found[check], found[check]

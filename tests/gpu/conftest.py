"""Random inputs of the GPU tests: the same every time, unless TPSERVE_TEST_SEED is set (`bench.gpu` draws one)."""

from __future__ import annotations

import os

import pytest
import torch

SEED = int(os.environ.get("TPSERVE_TEST_SEED", "0"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(SEED)

"""The second front keeps the contract."""

from __future__ import annotations

import pytest

from tests.helpers.contract import *  # noqa: F403
from tests.helpers.contract import Address
from tests.serve.process import Served


@pytest.fixture
def address(served: Served) -> Address:
    return Address(f"http://127.0.0.1:{served.port}", "tiny", served.log, "1e5", "predictions/tiny")

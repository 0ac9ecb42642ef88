"""TorchServe keeps the contract."""

from __future__ import annotations

import pytest

from tests.helpers.contract import *  # noqa: F403
from tests.helpers.contract import Address
from tests.torchserve.server import Server


@pytest.fixture
def address(server: Server) -> Address:
    model = server.process.models[0]
    return Address(f"http://127.0.0.1:{server.process.port}/predictions/{model}/1.0", model, server.log)

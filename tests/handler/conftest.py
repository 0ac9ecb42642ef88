from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.handler.fakes import FakeEngine, backend
from tests.handler.frontend import Frontend
from tpserve.handler.mailbox import Mailbox


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def frontend(engine: FakeEngine) -> Iterator[Frontend]:
    mailbox = Mailbox(backend(engine), abandoned_s=0.4)
    yield Frontend(mailbox)
    mailbox.close()

"""Settings for every test."""

import os
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Images of containers often forbid to write byte code. Some hundred processes are started here, each of which would
# compile the package and its dependencies again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Files of one folder whose tests share a server.
_SHARING = {"torchserve": ("test_contract.py", "test_serving.py", "test_stop.py"),
            "serve": ("test_contract.py", "test_examples.py", "test_serve.py")}  # fmt: skip
# What takes minutes goes first, so that what takes seconds fills the end.
_LONG = (
    "torchserve/", "faults/", "serve/", "engine/test_restart", "distributed/", "engine/test_generate",
    "engine/test_client", "machines/", "engine/test_re", "engine/test_controls", "engine/test_guided", "interpreted/",
    "bench/", "cli/", "engine/", "convert/",
)  # fmt: skip

# Examples share two cores with rank groups: how long one takes says nothing about the code.
settings.register_profile("tpserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tpserve")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # these collect, and are not told how many they are
        items.sort(key=lambda item: _place(item.nodeid))


def _place(nodeid: str) -> int:
    path = nodeid.partition("/")[2]
    return next((i for i, begin in enumerate(_LONG) if path.startswith(begin)), len(_LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes (`-n`), what shares a fixture is run by one of them: a file, or `_SHARING`."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            folder, file = path.split("/")[1], path.split("/")[-1]
            return folder if file in _SHARING.get(folder, ()) else path

    config.option.loadscopereorder = False  # by the number of tests
    return ByFixtures(config, log)

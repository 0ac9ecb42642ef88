"""Settings for every test."""

from typing import Any

import pytest
from hypothesis import HealthCheck, settings

_SHARING = ("torchserve", "serve", "faults")  # their tests share servers

# Examples share two cores with rank groups: how long one takes says nothing about the code.
settings.register_profile("tpserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tpserve")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes (`-n`), what shares a fixture is run by one of them: a file, or a folder with servers."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            folder = path.split("/")[1]
            return folder if folder in _SHARING else path

    return ByFixtures(config, log)

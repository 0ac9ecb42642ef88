"""Settings for every test."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

_SHARING = ("torchserve", "serve", "faults")  # their tests share servers

# Examples share two cores with rank groups: how long one takes says nothing about the code.
settings.register_profile("tpserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tpserve")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes (`-n`), what shares a fixture is run by one of them."""
    root = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(root).parts[0] if item.path.is_relative_to(root) else ""
        group = folder if folder in _SHARING else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))

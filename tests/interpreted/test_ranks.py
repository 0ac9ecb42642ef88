"""Several ranks' kernels, on a CPU: see `ranks.py`."""

from __future__ import annotations

import pytest

from tests.interpreted.beside import TIMEOUT_S, found_by
from tests.interpreted.ranks import GROUPS, checks_of

pytestmark = pytest.mark.timeout(TIMEOUT_S + 60)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """By group and check, what went wrong."""
    out = tmp_path_factory.mktemp("ranks") / "found.json"
    told: dict[str, dict[str, str]] = found_by("ranks", out, {"TRITON_INTERPRET": "1"})
    return told


@pytest.mark.parametrize(("group", "check"), [(group, check) for group in GROUPS for check in checks_of(group)])
def test_ranks_together_are_what_one_is(found: dict[str, dict[str, str]], group: str, check: str) -> None:
    assert not found[group][check], found[group][check]

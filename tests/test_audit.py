"""What `make audit` makes of pip-audit's report; the database itself is not asked here."""

from __future__ import annotations

import pytest

from scripts.audit import IGNORED, judge, read_ignored

ADVISORY = {"id": "PYSEC-1", "aliases": ["CVE-2026-1"], "fix_versions": ["2.0"], "description": "…"}
SOUND = {"name": "zmq", "version": "1", "vulns": []}
BAD = {"name": "h11", "version": "0.14", "vulns": [ADVISORY]}
UNKNOWN = {"name": "ours", "skip_reason": "not found"}


def test_an_advisory_fails_the_audit_unless_there_is_a_reason() -> None:
    report = {"dependencies": [SOUND, BAD, UNKNOWN]}
    lines, status = judge(report, {})
    assert status == 1
    assert "FOUND    h11 0.14: PYSEC-1, CVE-2026-1; fixed in 2.0" in lines
    assert "skipped  not in the database: ours" in lines
    lines, status = judge(report, {"CVE-2026-1": "we do not parse", "CVE-2020-2": "old"})
    assert status == 0
    assert "ignored  h11 0.14: PYSEC-1, CVE-2026-1: we do not parse" in lines
    assert any("CVE-2020-2" in line and line.startswith("unused") for line in lines)


def test_a_database_that_knows_nothing_is_no_good_news() -> None:
    lines, status = judge({"dependencies": [UNKNOWN]}, {})
    assert status == 2
    assert "nothing was audited" in lines[0]


def test_every_exception_has_a_reason() -> None:
    read_ignored(IGNORED.read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="has no reason"):
        read_ignored("CVE-2026-1\n")

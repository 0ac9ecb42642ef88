"""The command itself, where its subcommands are not tested by what they do."""

from __future__ import annotations

import sys

import pytest

from tpserve.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["serve", "--checkpoint", "--tp", "1"], "--checkpoint"),
        (["verify", "folder", "--against"], "--against"),
        (["convert", "--from", "--to", "folder"], "--from"),
        (["node", "host:1", "--key-file"], "--key-file"),
    ],
)
def test_an_option_whose_value_was_forgotten_is_said_to_lack_it(
    arguments: list[str], option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tpserve", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {option} needs a value behind it\n"

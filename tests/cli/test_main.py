"""The command itself, where its subcommands are not tested by what they do."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["serve", "--checkpoint", "--tp", "1"], "--checkpoint"),
        (["verify", "folder", "--against"], "--against"),
        (["convert", "--from", "--to", "folder"], "--from"),
        (["node", "host:1", "--key-file"], "--key-file"),
        (["serve", "--checkpoint", "folder", "--tp"], "--tp"),
        (["serve", "--ssl-keyfile", "--port", "1"], "--ssl-keyfile"),
    ],
)
def test_an_option_whose_value_was_forgotten_is_said_to_lack_it(arguments: list[str], option: str) -> None:
    command = [sys.executable, "-m", "tpserve.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"error: {option} needs a value behind it\n")

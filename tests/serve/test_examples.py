"""The examples as users run them. The model's words mean nothing: what counts is what the protocols promise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.process import Served

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(served: Served, *command: str) -> str:
    """What an example prints; it must end well."""
    env = {**os.environ, "TPSERVE_URL": f"http://127.0.0.1:{served.port}", "TPSERVE_API_KEY": "1e5"}
    done = subprocess.run(command, cwd=EXAMPLES, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def tokens(told: str) -> int:
    (number,) = re.findall(r"^stream: (\d+) tokens$", told, re.MULTILINE)
    return int(number)


def test_curl(served: Served) -> None:
    told = run(served, "sh", "curl.sh").split("== ")[1:]
    parts = {title: body.strip() for title, _, body in (part.partition("\n") for part in told)}
    assert len(parts) == 8
    assert parts["the model's name"] == "tiny"
    predictions, chat, several, choice, triton, metrics = list(parts.values())[2:]
    assert '"finish_reason":' in predictions.splitlines()[-1]
    assert chat.endswith("data: [DONE]")
    assert several.count('"finish_reason":') == 2
    assert re.search(r'"text": ?" ?(good|bad)"', choice)
    assert '"text_output":' in triton
    assert re.search(r"^tpserve:generation_tokens_total [1-9]", metrics, re.MULTILINE)


def test_curl_fails_without_a_key(served: Served) -> None:
    env = {"PATH": os.environ["PATH"], "TPSERVE_URL": "http://127.0.0.1:1"}
    command = ["sh", "curl.sh", f"http://127.0.0.1:{served.port}"]
    done = subprocess.run(command, cwd=EXAMPLES, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "no valid API key" in done.stdout


def test_openai_python(served: Served) -> None:
    told = run(served, sys.executable, "openai_python.py")
    assert 0 < tokens(told) <= 32
    assert re.search(r"^schema: ({'city': '(Paris|Rome)'}|cut off)$", told, re.MULTILINE)
    assert re.search(r"^tools: (weather\({'city': '(Paris|Rome)'}\)\n+told: |cut off$)", told, re.MULTILINE)


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
def test_fetch(served: Served) -> None:
    assert 0 < tokens(run(served, "node", "fetch.mjs")) <= 32


def test_langchain(served: Served) -> None:
    told = run(served, sys.executable, "langchain_example.py")
    assert 0 < tokens(told) <= 32
    assert told.endswith("batch: 2 answers\n")


def test_triton_client(served: Served) -> None:
    told = run(served, sys.executable, "triton_client.py")
    assert len(re.findall(r"^infer: \d+ tokens: ", told, re.MULTILINE)) == 2
    assert re.search(r"^generate_stream: \d+ events; the same text: True$", told, re.MULTILINE)

"""Meta's reference implementation, token for token, through `tpserve serve` at every tensor-parallel size up to 8.

stories260K has 8 heads over 4 key/value heads and 172 feed-forward columns: 3, 5, 6 and 7 divide none of them, and 8
ranks share the key/value heads. `make test` sees the beginning of every answer at 3 (and all of it at 1, 2 and 4
through TorchServe: `tests/torchserve`), `make test-faults` all of it at all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.data import stories_reference
from tests.helpers.stories import converted
from tests.serve.process import Served

BEGINNING_TOKENS = 16

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("stories"))


@pytest.fixture
def sized(request: pytest.FixtureRequest, stories: Path, tmp_path: Path) -> Iterator[Served]:
    """A server of so many ranks."""
    options = ("--standby", "False", "--max_seq_len", "512", "--access_log", "False")
    served = Served(stories, tmp_path / "log", "--tp", str(request.param), *options)
    served.timeout_s = 240  # eight ranks may have two cores
    try:
        served.wait_until_ready(timeout_s=180)
        yield served
        assert served.blocks_in_use() == [0] * request.param
    finally:
        served.close()


def together(served: Served, asked: list[dict[str, Any]]) -> list[Any]:
    """The answers to requests that run in one batch."""

    def ask(body: dict[str, Any]) -> Any:
        status, answer = served.ask("POST", "/predictions/stories260K", body | {"temperature": 0, "stream": False})
        assert status == 200, answer
        return json.loads(answer)

    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(ask, asked))


def completions(served: Served, most_tokens: int) -> None:
    """Asserts that every completion of the reference begins with the same text, at the same log-probabilities."""
    expected = stories_reference()["completions"]
    lengths = [min(most_tokens, len(one["logprobs"])) for one in expected]
    asked = [
        {"prompt": one["prompt"], "max_new_tokens": n, "logprobs": True}
        for one, n in zip(expected, lengths, strict=True)
    ]
    for answer, one, n in zip(together(served, asked), expected, lengths, strict=True):
        whole = n == len(one["logprobs"])
        assert one["text"] == answer["text"] if whole else one["text"].startswith(answer["text"])
        assert answer["logprobs"] == pytest.approx(one["logprobs"][:n], abs=2e-3)


@pytest.mark.parametrize("sized", [3], indirect=True)
def test_every_answer_begins_as_the_references(sized: Served) -> None:
    completions(sized, BEGINNING_TOKENS)


@pytest.mark.faults
@pytest.mark.parametrize("sized", range(1, 9), indirect=True)
def test_every_answer_is_the_references(sized: Served) -> None:
    completions(sized, 10**6)
    chats = stories_reference()["chats"]
    asked = [{"dialog": chat["dialog"], "max_new_tokens": 80} for chat in chats]
    for answer, chat in zip(together(sized, asked), chats, strict=True):
        # The reference's length limit is not recorded: its answer is the beginning of a longer one.
        assert answer["text"].startswith(chat["reply"]["content"])

"""Fewer bits through the engine: weights when they are loaded, keys and values in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.local import LocalEngine
from tests.helpers.requests import Collected
from tests.helpers.stories import converted, prompts
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("bits"))


def config(folder: Path, **how: str | int) -> EngineConfig:
    return EngineConfig(
        checkpoint_dir=str(folder), device="cpu", max_seq_len=128, max_num_seqs=8, kv_cache_bytes=1 << 20, **how
    )  # type: ignore[arg-type]


def answers(engine: LocalEngine) -> list[list[int]]:
    streams = [Collected(engine, prompt, max_new_tokens=20, ignore_eos=True) for prompt in prompts(6)]  # type: ignore[arg-type]
    engine.run()
    return [stream.ids for stream in streams]


@pytest.mark.parametrize(
    ("how", "alike"),
    [({"quantization": "int8"}, 0.7), ({"quantization": "int4"}, 0.3), ({"quantization": "fp8"}, 0.5),
     ({"kv_cache_dtype": "fp8"}, 0.3), ({"quantization": "int8", "dtype": "bfloat16", "kv_cache_dtype": "fp8"}, 0.3)],
)  # fmt: skip
def test_most_tokens_stay(stories: Path, how: dict[str, str], alike: float) -> None:
    """Greedy tokens of a model of 260,000 parameters; after the first that differs, all may."""
    exact, fewer = answers(LocalEngine(config(stories))), answers(LocalEngine(config(stories, **how)))
    same = sum(a == b for x, y in zip(exact, fewer, strict=True) for a, b in zip(x, y, strict=True))
    assert [len(ids) for ids in fewer] == [20] * 6
    assert same >= alike * sum(map(len, exact)), f"{same} of {sum(map(len, exact))}"


def test_a_cache_of_float8_holds_four_times_what_one_of_float32_holds(stories: Path) -> None:
    whole, fewer = (LocalEngine(config(stories, kv_cache_dtype=dtype)).core.shape for dtype in ("auto", "fp8"))
    most = 8 * 128 // 16  # never more than could be in use
    assert fewer.num_blocks == min(most, 4 * whole.num_blocks)
    assert fewer.num_blocks > whole.num_blocks


@pytest.mark.parametrize("wrong", [{"quantization": "int3"}, {"kv_cache_dtype": "int8"}])
def test_other_names_are_refused(stories: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        config(stories, **wrong)

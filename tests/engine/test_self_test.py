"""The self-test before a group is ready: it passes whatever is sound, and names what is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import PARAMS
from tests.helpers.corrupt_worker import CORRUPT
from tests.helpers.foreign import hf_config, hf_weights, write_hf
from tests.helpers.groups import with_
from tests.helpers.local import LocalEngine
from tests.helpers.shards import random_weights
from tpserve.engine import group
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import SelfTestError
from tpserve.engine.protocol import RequestOutput
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.supervisor import RankGroup
from tpserve.model.attention import PagedAttention
from tpserve.model.loader import LoadedModel, load_model


@pytest.fixture
def config(tiny_config: EngineConfig) -> EngineConfig:
    return with_(tiny_config, tensor_parallel_size=1)


def start(config: EngineConfig) -> LocalEngine:
    engine = LocalEngine(config)
    engine.core.close()
    return engine


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"quantization": "int8"},
        {"quantization": "int8", "dtype": "bfloat16"},
        {"quantization": "fp8", "dtype": "bfloat16"},
        {"quantization": "int4", "dtype": "bfloat16"},
        {"kv_cache_dtype": "fp8"},
        {"load_format": "dummy"},
        {"max_seq_len": 3, "max_num_batched_tokens": 32, "num_kv_blocks": 1},
        {"max_num_batched_tokens": 1, "max_num_seqs": 1},
    ],
    ids=str,
)
def test_what_is_sound_passes(config: EngineConfig, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[int] = []
    check = group.check_weights

    def counted(*arguments: Any) -> Any:
        probe = check(*arguments)
        probed.append(len(probe.tokens))
        return probe

    monkeypatch.setattr(group, "check_weights", counted)
    start(with_(config, **changes))
    assert probed == [min(32, changes.get("max_seq_len", 256), changes.get("max_num_batched_tokens", 64))]


def test_nothing_is_left_of_it(config: EngineConfig) -> None:
    answers = []
    for self_test in (True, False):
        engine = LocalEngine(with_(config, self_test=self_test))
        outputs: list[RequestOutput] = []
        for i in range(3):
            params = SamplingParams(max_new_tokens=20, temperature=0.8, seed=i, ignore_eos=True)
            engine.submit(str(i), [3 + i, 5, 7], params, outputs.append)
        engine.run()
        engine.core.close()
        answers.append([(output.request_id, output.token_ids) for output in outputs])
    assert answers[0] == answers[1]
    assert answers[0]


def scaled(name: str, factor: float) -> Callable[[LoadedModel], LoadedModel]:
    def change(loaded: LoadedModel) -> LoadedModel:
        loaded.model.state_dict()[name].mul_(factor)
        return loaded

    return change


def one_value(name: str, value: float) -> Callable[[LoadedModel], LoadedModel]:
    def change(loaded: LoadedModel) -> LoadedModel:
        loaded.model.state_dict()[name].view(-1)[7] = value
        return loaded

    return change


def other_angles(loaded: LoadedModel) -> LoadedModel:
    loaded.model.rope_PC2 = loaded.model.rope_PC2.flip(-1)
    return loaded


def too_large(loaded: LoadedModel) -> LoadedModel:
    """Finite weights, whose products are not."""
    for name in ("w1", "w3"):
        scaled(f"layers.0.feed_forward.{name}.weight", 1e30)(loaded)
    return loaded


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (scaled("layers.1.feed_forward.w2.weight", 1.01), "layer 1 computes something else than the checkpoint's"),
        (one_value("layers.0.attention.wq.weight", 3.0), "layer 0 computes something else"),
        (other_angles, "layer 0 computes something else"),
        (scaled("tok_embeddings.weight", 1.01), "the embedding computes something else"),
        (scaled("output.weight", -1.0), r"the head computes .* off by 200\.00% \(allowed: 0\.10%\)"),
        (scaled("norm.weight", 1.01), "the head computes something else"),
        # Not a weight that the probe comes by: token 1 is not in it.
        (one_value("tok_embeddings.weight", float("nan")), r"tok_embeddings\.weight holds values that are not finite"),
        (one_value("layers.1.attention.wo.weight", float("inf")), r"layers\.1\.attention\.wo\.weight holds values"),
        (too_large, "layer 0 gives values that are not finite"),
    ],
)
def test_a_weight_that_is_wrong_in_memory(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, change: Callable[[LoadedModel], LoadedModel], said: str
) -> None:
    monkeypatch.setattr(group, "load_model", lambda *args, **options: change(load_model(*args, **options)))
    with pytest.raises(SelfTestError, match=f"self-test: {said}"):
        start(config)
    start(with_(config, self_test=False))


def test_fewer_bits_hide_no_wrong_slice(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(loaded: LoadedModel) -> LoadedModel:
        weight = loaded.model.state_dict()["layers.1.attention.wv.weight"]
        weight.copy_(weight.flip(0))
        return loaded

    monkeypatch.setattr(group, "load_model", lambda *args, **options: change(load_model(*args, **options)))
    with pytest.raises(SelfTestError, match="layer 1 computes something else"):
        start(with_(config, quantization="int4", dtype="bfloat16"))


@pytest.mark.parametrize("tokens", ["many", "one"])
def test_steps_that_compute_something_else(config: EngineConfig, monkeypatch: pytest.MonkeyPatch, tokens: str) -> None:
    """As a kernel with a fault would: of prompts, or of decode steps."""
    attend = PagedAttention.__call__

    def faulty(self: PagedAttention, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attend(self, layer, q, k, v)
        return -out if (len(q) == 1) == (tokens == "one") else out

    monkeypatch.setattr(PagedAttention, "__call__", faulty)
    with pytest.raises(SelfTestError, match=r"the steps that serve give log-probabilities that are off by"):
        start(with_(config, fused_kernels=False))


def test_a_rank_with_a_wrong_slice_is_refused_at_once(
    tiny_config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real ranks: whoever starts the server is told, and nothing is tried again."""
    monkeypatch.setattr(RankGroup, "worker", "tests.helpers.corrupt_worker")
    monkeypatch.setenv(CORRUPT, "layers.1.feed_forward.w1.weight")
    client = EngineClient(tiny_config)
    with pytest.raises(ValueError, match="self-test: rank 0: layer 1 computes something else"):
        client.start()
    assert client.num_restarts == 0
    client.close()


def test_what_one_rank_finds_all_ranks_say(tiny_config: EngineConfig, tmp_path: Path) -> None:
    """Other people's files have no sums: a value that is not finite is found here, on the rank that has it."""
    weights = random_weights(PARAMS)
    weights["layers.0.feed_forward.w1.weight"][-1, 3] = float("nan")
    write_hf(tmp_path, hf_weights(weights, 8), hf_config(PARAMS, weights))
    client = EngineClient(with_(tiny_config, checkpoint_dir=str(tmp_path)))
    with pytest.raises(ValueError, match=r"rank 1: layers\.0\.feed_forward\.w1\.weight holds values that are not"):
        client.start()
    client.close()

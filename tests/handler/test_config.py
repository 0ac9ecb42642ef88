"""model-config.yaml: the old example's keys, the engine's, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError
from tpserve.engine.sampling_params import SamplingParams
from tpserve.handler.config import HandlerConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DIR = Path("/models/llama")

OLD_EXAMPLE = """
minWorkers: 1
maxWorkers: 1
maxBatchDelay: 200
responseTimeout: 300
parallelType: "tp"
deviceType: "gpu"
torchrun:
    nproc-per-node: 8
handler:
    converted_ckpt_dir: "converted_checkpoints"
    tokenizer_path: "tokenizer.model"
    model_args_path: "model_args.json"
    max_seq_len: 512
    max_batch_size: 6
    max_new_tokens: 50
    temperature: 0.6
    top_p: 0.9
    manual_seed: 40
    mode: "text_completion"
"""


def read(handler: dict[str, Any], **top: Any) -> HandlerConfig:
    return HandlerConfig.from_yaml({"handler": {"converted_ckpt_dir": "ckpt", **handler}, **top}, DIR)


def test_the_old_examples_file() -> None:
    config = HandlerConfig.from_yaml(yaml.safe_load(OLD_EXAMPLE), DIR)
    assert config.engine == EngineConfig(
        checkpoint_dir="/models/llama/converted_checkpoints", tensor_parallel_size=8, max_seq_len=512, max_num_seqs=6
    )
    assert config.defaults.params == SamplingParams(max_new_tokens=50, temperature=0.6, top_p=0.9, seed=40)
    assert (config.defaults.max_new_tokens_cap, config.continuous_batching, config.tokenizer) == (50, False, None)


def test_a_tokenizer_beside_the_yaml_is_used(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    config = HandlerConfig.from_yaml(yaml.safe_load(OLD_EXAMPLE), tmp_path)
    assert config.tokenizer == tmp_path / "tokenizer.model"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("model-config-*.yaml")), ids=lambda path: path.stem)
def test_the_packaged_files(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    config = HandlerConfig.from_yaml(content, DIR)
    assert config.continuous_batching
    assert config.engine.tensor_parallel_size == content["torchrun"]["nproc-per-node"]
    assert config.engine.start_timeout_s < content["startupTimeout"]
    # More must reach the engine than it admits, or nobody would ever be told 429.
    assert config.engine.max_num_seqs + config.engine.max_num_waiting < content["batchSize"]
    assert "parallelType" not in content


def test_engine_keys_stand_beside_the_old_ones() -> None:
    config = read({"num_kv_blocks": 7, "dtype": "bfloat16", "converted_ckpt_dir": "/abs"}, deviceType="cpu")
    assert (config.engine.num_kv_blocks, config.engine.dtype) == (7, "bfloat16")
    assert (config.engine.checkpoint_dir, config.engine.device) == ("/abs", "cpu")


def test_every_sampling_field_may_have_a_default() -> None:
    config = read({"n": 2, "stop": "x", "logit_bias": {5: -1}, "min_p": 0.1, "bad_words": [[3]], "max_new_tokens": 9})
    assert config.defaults.params == SamplingParams(
        n=2, stop=("x",), logit_bias={5: -1.0}, min_p=0.1, bad_words=((3,),), max_new_tokens=9
    )
    assert config.defaults.max_new_tokens_cap == 9


@pytest.mark.parametrize(
    ("handler", "top", "said"),
    [
        ({"temprature": 1}, {}, "unknown key 'temprature' .did you mean 'temperature'"),
        ({"converted_ckpt_dir": None}, {}, "converted_ckpt_dir must name"),
        ({"max_batch_size": 2, "max_num_seqs": 2}, {}, "max_batch_size and max_num_seqs are the same"),
        ({"max_seq_len": "long"}, {}, "max_seq_len"),
        ({"max_seq_len": -1}, {}, "max_seq_len must be positive"),
        ({"temperature": -1}, {}, "temperature .* got -1"),
        ({"temperature": "hot"}, {}, "temperature must be a number"),
        ({"max_new_tokens": 0}, {}, "max_new_tokens must be at least 1"),
        ({"manual_seed": 1.5}, {}, "manual_seed must be an integer"),
        ({"manual_seed": 1, "seed": 1}, {}, "manual_seed and seed are the same"),
        ({"bad_words": ["x"]}, {}, "send token ids"),
        ({"stop": 3}, {}, "stop must be a list of strings"),
        ({"logit_bias": {"x": 1}}, {}, "logit_bias must have token ids"),
        ({"mode": "poetry"}, {}, "mode must be one of"),
        ({"tensor_parallel_size": 2}, {"torchrun": {"nproc-per-node": 4}}, "nproc-per-node is 4"),
        ({}, {"torchrun": {"nproc-per-node": 0}}, "positive integer, got 0"),
    ],
)
def test_what_is_refused(handler: dict[str, Any], top: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(handler, **top)


def test_a_yaml_without_handler_section() -> None:
    with pytest.raises(ConfigError, match="no handler: section"):
        HandlerConfig.from_yaml({"minWorkers": 1}, DIR)


@pytest.mark.parametrize(
    ("top", "gpu_id", "already", "visible"),
    [
        ({}, None, None, None),
        ({}, 0, None, "0,1"),
        ({}, 2, None, "2,3"),
        ({"deviceIds": [4, 6]}, 0, None, "4,6"),
        ({"deviceIds": [0, 2]}, 0, "3,5,7", "3,7"),
        ({"deviceIds": [0, 9]}, 0, "3,5,7", None),
        ({"parallelType": "tp"}, 0, "0,1", None),
        ({"deviceType": "cpu"}, 0, None, None),
    ],
)
def test_the_gpus_that_the_ranks_see(
    top: dict[str, Any], gpu_id: int | None, already: str | None, visible: str | None
) -> None:
    assert read({"tensor_parallel_size": 2}, **top).visible_devices(gpu_id, already) == visible

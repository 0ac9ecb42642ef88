"""Shards that Fairscale itself made, and ranks that load with DTensor: two gloo processes each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.convert.reading import assert_same, load_stock
from tests.convert.workers import load_as_dtensors, save_fairscale_shard
from tests.helpers.ranks import run_ranks
from tests.helpers.shards import TINY_PARAMS
from tpserve.convert.convert import convert


@pytest.mark.parametrize("vocab_parallel", [False, True], ids=["ParallelEmbedding", "VocabParallelEmbedding"])
def test_shards_of_fairscales_own_layers_join_to_what_they_were_cut_from(tmp_path: Path, vocab_parallel: bool) -> None:
    source = tmp_path / "in"
    source.mkdir()
    run_ranks(save_fairscale_shard, (2, str(tmp_path / "store"), str(source), vocab_parallel), nprocs=2)
    (source / "params.json").write_text(json.dumps(TINY_PARAMS))
    whole = torch.load(source / "whole.pt", weights_only=True)
    shard = torch.load(source / "consolidated.01.pth", weights_only=True)
    assert shard["tok_embeddings.weight"].shape == ((45, 32) if vocab_parallel else (90, 16))
    assert_same(load_stock(convert(source, tmp_path / "out", progress=False), whole), whole)


@pytest.mark.parametrize("tp", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_load_their_parts_into_dtensors(ckpt: Path, tmp_path: Path, tp: int) -> None:
    out = convert(ckpt, tmp_path / "out", progress=False)
    run_ranks(load_as_dtensors, (tp, str(tmp_path / "store"), str(out)), nprocs=tp)

"""What the sampler is told of a batch: it skips what no row asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tpserve.engine.batch import DrawBuilder
from tpserve.engine.rows import Uploader
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.sequence import Sequence

WARM = {"temperature": 1.0}


@pytest.mark.parametrize(
    ("ways", "any_filter", "largest_top_k"),
    [
        ([{}], False, 0),
        ([{"top_p": 0.5, "top_k": 5}], False, 0),  # greedy
        ([WARM], False, 0),
        ([WARM, WARM | {"top_p": 0.5}], True, 0),
        ([WARM | {"top_p_decay": 0.9}], True, 0),  # its top_p will be below 1
        ([WARM | {"top_k": 7}, WARM | {"top_k": 9}, {"top_k": 20}], True, 9),
        ([WARM | {"top_k": 7}, WARM | {"top_k": 100}, WARM | {"top_k": 5000}], True, 7),  # more than there are: all
    ],
)
def test_what_no_row_asks_for(ways: list[dict[str, Any]], any_filter: bool, largest_top_k: int) -> None:
    seqs = []
    for i, how in enumerate(ways):
        seqs.append(Sequence(f"r{i}", [5], SamplingParams(**how), max_seq_len=64, eos_token_ids=(2,)))
        seqs[-1].row = i
    static = DrawBuilder(100, Uploader(torch.device("cpu"))).build(seqs, [1] * len(seqs)).static
    assert static.any_random == any("temperature" in how for how in ways)
    assert static.any_filter == any_filter
    assert static.largest_top_k == largest_top_k

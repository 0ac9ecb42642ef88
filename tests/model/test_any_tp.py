"""Any number of ranks gives the logits of one: ranks are threads here, and collectives meet at a barrier."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from tests.helpers.shards import TINY_PARAMS, write_fairscale_checkpoint
from tpserve.convert.convert import convert
from tpserve.model.attention import PagedAttention, SequenceSlice
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.loader import load_model
from tpserve.model.parallel import TensorParallel, num_kv_heads

TOKENS = [1, 5, 17, 80, 33, 2, 64, 9, 41]
# Heads, key/value heads; the width is 8 a head, the FFN 88 or 172: neither 3 nor 5, 6 nor 7 divide anything.
SHAPES = [(8, 2), (8, 4), (6, 6), (9, 3), (7, 1)]


class Meeting:
    """Collectives of threads.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self._barrier, self._parts = threading.Barrier(size, timeout=60), [torch.empty(0)] * size

    def all(self, rank: int, part: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's part."""
        self._parts[rank] = part
        self._barrier.wait()
        parts = list(self._parts)
        self._barrier.wait()
        return parts


def logits(folder: Path, size: int) -> torch.Tensor:
    """A prefill and a decode step on `size` ranks."""
    meeting, found, failures = Meeting(size), [torch.empty(0)] * size, []

    def rank(index: int) -> None:
        try:
            tp = TensorParallel(index, size)
            loaded = load_model(folder, tp=tp, dtype=torch.float32, max_seq_len=64)
            model, args = loaded.model, loaded.info.args
            if size > 1:
                for block in model.layers:
                    block.attention.all_reduce = block.feed_forward.all_reduce = (  # type: ignore[union-attr]
                        lambda x: torch.stack(meeting.all(index, x)).sum(0)
                    )
                model.gather = lambda x: torch.cat(meeting.all(index, x), dim=1)
            cache = PagedKVCache(
                args.n_layers, 4, 4, num_kv_heads(args, tp), args.head_dim, dtype=torch.float32,
                device=torch.device("cpu"),
            )  # fmt: skip
            steps = []
            n, table = len(TOKENS), torch.arange(4)[None]
            for start, stop in ((0, n - 1), (n - 1, n)):
                positions = torch.arange(start, stop)
                decodes = [stop] if stop - start == 1 else []
                prefills = [] if decodes else [SequenceSlice(start, stop - start)]
                attend = PagedAttention(cache, table, torch.zeros_like(positions), positions, decodes, prefills)
                steps.append(model(torch.tensor(TOKENS[start:stop]), positions, attend))
            found[index] = torch.cat(steps)
        except BaseException as e:
            failures.append(e)
            raise

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(size)]
    with torch.inference_mode():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert all(torch.equal(other, found[0]) for other in found)
    return found[0]


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
def test_any_number_of_ranks_gives_the_logits_of_one(tmp_path: Path, heads: int, kv_heads: int) -> None:
    params = TINY_PARAMS | {"dim": 8 * heads, "n_heads": heads, "n_kv_heads": kv_heads, "n_layers": 2}
    write_fairscale_checkpoint(tmp_path / "in", params, mp=1)
    folder = convert(tmp_path / "in", tmp_path / "out", progress=False)
    alone = logits(folder, 1)
    assert alone.shape == (len(TOKENS), params["vocab_size"])
    for size in range(2, heads + 1):
        torch.testing.assert_close(logits(folder, size), alone, atol=2e-5, rtol=0)

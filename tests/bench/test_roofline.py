"""What a step needs, counted another way, and how it is judged."""

from __future__ import annotations

import pytest
import torch

from tpserve.bench import roofline
from tpserve.bench.roofline import Ceilings, Work
from tpserve.model.args import ModelArgs
from tpserve.model.llama import Llama

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=90, ffn_hidden_dim=88)
DEVICE = Ceilings("d", "bfloat16", bytes_per_s=1e9, flop_per_s=1e12)


def test_weights_are_those_of_the_network() -> None:
    with torch.device("meta"):
        model = Llama(ARGS, 16)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "tok_embeddings" not in n)
    assert roofline.decode(ARGS, 1, batch=0, context=0, itemsize=2).bytes == 2 * matrices
    assert roofline.decode(ARGS, 4, batch=0, context=0, itemsize=2).bytes == 2 * matrices / 4
    assert roofline.decode(ARGS, 1, batch=1, context=0, itemsize=2).flop == 2 * matrices


def test_keys_values_and_attention() -> None:
    """Of 3 sequences of 10 tokens: 2 layers, 2 KV heads of 8, keys and values; 4 query heads against 10 keys."""
    none, some = (roofline.decode(ARGS, 1, 3, context, 2) for context in (0, 10))
    assert some.bytes - none.bytes == 3 * 10 * 2 * 2 * (2 * 8) * 2
    assert some.flop - none.flop == 3 * 2 * 4 * (2 * 8 * 10 + 2 * 8 * 10)


def test_a_prefill_of_one_token_is_a_step() -> None:
    assert roofline.prefill(ARGS, 2, 5, 1, 2).flop == roofline.decode(ARGS, 2, 5, 1, 2).flop
    assert roofline.prefill(ARGS, 2, 5, 1, 2).bytes == roofline.decode(ARGS, 2, 5, 1, 2).bytes


def test_a_step_of_both_reads_the_weights_once() -> None:
    decoded, prompt, weights = (
        roofline.decode(ARGS, 1, 3, 10, 2), roofline.prefill(ARGS, 1, 1, 7, 2), roofline.prefill(ARGS, 1, 0, 7, 2)
    )  # fmt: skip
    both = roofline.together(decoded, prompt, without=weights)
    assert both.bytes == roofline.decode(ARGS, 1, 3, 10, 2).bytes + 7 * 2 * 2 * (2 * 8) * 2
    assert both.flop == decoded.flop + prompt.flop


def test_a_prefill_counts_what_torch_counts() -> None:
    """Torch counts every product; attention there is over the whole square, and so is twice less a diagonal."""
    from torch.utils.flop_counter import FlopCounterMode

    length, width = 12, ARGS.n_heads * ARGS.head_dim
    x, q = torch.zeros(length, ARGS.dim), torch.zeros(1, ARGS.n_heads, length, ARGS.head_dim)
    kv = ARGS.n_kv_heads * ARGS.head_dim
    with FlopCounterMode(display=False) as counter:
        for _ in range(ARGS.n_layers):
            for rows in (width, kv, kv, ARGS.dim):
                x @ torch.zeros(rows, ARGS.dim).T
            q @ q.transpose(2, 3) @ q
            for _ in range(3):
                x @ torch.zeros(ARGS.ffn_hidden_dim, ARGS.dim).T
        x[-1:] @ torch.zeros(ARGS.vocab_size, ARGS.dim).T
    unseen = 4 * ARGS.n_layers * width * (length * (length - 1) // 2)
    assert roofline.prefill(ARGS, 1, 1, length, 2).flop == counter.get_total_flops() - unseen


def test_the_longer_of_both_is_the_bound() -> None:
    memory = roofline.judge(Work(bytes=2e6, flop=1e9), DEVICE, ms=4.0)
    assert (memory["bound"], memory["floor_ms"], memory["share"]) == ("memory", 2.0, 0.5)
    compute = roofline.judge(Work(bytes=2e6, flop=8e9), DEVICE, ms=10.0)
    assert (compute["bound"], compute["floor_ms"], compute["share"]) == ("compute", 8.0, 0.8)
    run = roofline.judge_run([(Work(2e6, 8e9), 1), (Work(2e6, 1e9), 10)], DEVICE, ms=40.0)
    assert (run["floor_ms"], run["bound"], run["share"]) == (28.0, "memory", 0.7)
    assert (run["gbytes"], run["gflop"]) == pytest.approx((0.022, 18.0))


def test_a_row_has_its_lines() -> None:
    latency = {"kind": "lat", "batch": 2, "in": 8, "out": 4, "ttft_ms": 1.0, "step_ms": 0.5, "tokens_per_s": 1.0}
    found = roofline.of_row(latency, ARGS, 1, DEVICE, 2)
    assert found["a step"]["gflop"] == roofline.decode(ARGS, 1, 2, 10, 2).flop / 1e9
    assert found["first token"]["ms"] == 1.0
    (run,) = roofline.of_row({**latency, "kind": "thr", "tokens_per_s": 100.0}, ARGS, 1, DEVICE, 2).values()
    assert run["ms"] == pytest.approx(80.0)
    text = roofline.line("a step", found["a step"])
    assert "memory-bound" in text
    assert "1 GB/s, 1 TFLOP/s" in text


def test_a_cpus_ceilings_are_measured() -> None:
    found = roofline.measured("cpu", "float32")
    assert 1e8 < found.bytes_per_s < 1e12
    assert 1e8 < found.flop_per_s < 1e14
    with pytest.raises(RuntimeError, match="could not be measured"):
        roofline.measured("cpu", "no_such_type")

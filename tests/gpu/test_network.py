"""The fused network beside the plain one: as near to float32 as 16 bits are anyhow, in mixed steps and in graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.gpu.network_driver import SHAPES, Driver, llama
from tests.helpers.draws import Row, make_batch
from tpserve.model.fused_network import FusedNetwork

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]
STEPS = [
    [(0, 0, 37), (1, 0, 64), (2, 0, 100)],
    [(0, 37, 1), (1, 64, 1), (2, 100, 1)],
    [(0, 38, 1), (2, 101, 1), (1, 65, 30), (3, 0, 129)],
    [(3, 129, 1)],
    [(0, 39, 1), (1, 95, 1), (2, 102, 1), (3, 130, 1)],
    [(row, 0, 5) for row in range(4, 40)],
    [(row, 5, 1) for row in range(4, 40)],
    [(0, 40, 1), *((row, 6, 1) for row in range(4, 30))],
    [(0, 41, 1), *((row, 7, 1) for row in range(4, 30)), (3, 131, 20), (30, 6, 2)],
    [*((row, 8, 1) for row in range(4, 22)), (2, 103, 190)],
    [(0, 42, 1), (1, 95, 1), (2, 293, 140)],
]


@pytest.fixture(params=[None, 1], ids=["measured", "Hopper"])
def _hopper_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of few tokens would not see `prefill_hopper.py`."""
    if request.param is not None:
        monkeypatch.setattr("tpserve.model.kernels.prefill_attention._HOPPER_ROWS", request.param)


@pytest.mark.usefixtures("_hopper_rows")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), SHAPES)
def test_fused_is_as_near_to_float32_as_plain(dim: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    model = llama(dim, heads, kv_heads)
    exact, plain = Driver(model, torch.float32, False), Driver(model, dtype, False)
    fused = Driver(model, dtype, True)
    for i, parts in enumerate(STEPS):
        reference = exact.step(parts)
        plain_error = ((plain.step(parts) - reference).norm() / reference.norm()).item()
        fused_error = ((fused.step(parts) - reference).norm() / reference.norm()).item()
        assert fused_error < 1.3 * plain_error + 1e-3, (i, fused_error, plain_error)
        assert plain_error < 0.05, "the yardstick is bent"


@pytest.mark.parametrize(("dim", "heads", "kv_heads"), SHAPES)
def test_in_float32_fused_is_plain(dim: int, heads: int, kv_heads: int) -> None:
    """But for the order of sums."""
    model = llama(dim, heads, kv_heads)
    plain, fused = Driver(model, torch.float32, False), Driver(model, torch.float32, True)
    for parts in STEPS:
        expected, got = plain.step(parts), fused.step(parts)
        assert ((got - expected).norm() / expected.norm()).item() < 1e-5, parts
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max(), parts


@pytest.mark.usefixtures("_hopper_rows")
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), SHAPES)
def test_prompts_that_go_on_ask_for_nothing(dim: int, heads: int, kv_heads: int) -> None:
    """But what they leave in the cache is what the rest of them needs. By graphs, and too many for those."""
    model = llama(dim, heads, kv_heads)
    whole, cut = (Driver(model, torch.float32, fused) for fused in (False, True))
    for prompts in (3, 20):
        expected = whole.step([(row, 0, 90) for row in range(prompts)])
        assert cut.step([(row, 0, 60) for row in range(prompts)], asked=False).shape == (0, 1000)
        got = cut.step([(row, 60, 30) for row in range(prompts)])
        assert ((got - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize(("dim", "heads", "kv_heads"), SHAPES[1:])
def test_graphs_repeat_themselves_bit_by_bit(dim: int, heads: int, kv_heads: int) -> None:
    a, b = (Driver(llama(dim, heads, kv_heads), torch.bfloat16, True) for _ in range(2))
    assert a.improve(idle=True) == b.improve(idle=True) > 10
    for parts in STEPS:
        assert torch.equal(a.step(parts), b.step(parts))
        assert torch.equal(a.step(parts), b.step(parts))


@pytest.mark.usefixtures("_hopper_rows")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), SHAPES[1:])
def test_graphs_give_the_bits_of_the_kernels_alone(dim: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Of steps before their capture, of steps after it, and of a network that never captures."""
    model = llama(dim, heads, kv_heads)
    one, other = Driver(model, dtype, True), Driver(model, dtype, True, graphs=False)
    before = [one.step(parts) for parts in STEPS]
    assert one.improve(idle=False) == 1
    again = [one.step(parts) for parts in STEPS]  # some captured, some not
    graphs = one.improve(idle=True)
    assert graphs >= 10
    assert not one.network.improvable
    after = [one.step(parts) for parts in STEPS]
    never = [other.step(parts) for parts in STEPS]
    assert not other.network.improvable
    for i, logits in enumerate(zip(before, again, after, never, strict=True)):
        assert all(torch.equal(logits[0], others) for others in logits[1:]), STEPS[i]


def test_without_memory_for_graphs_steps_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(llama(*SHAPES[1]), torch.bfloat16, True)
    network = driver.network
    assert isinstance(network, FusedNetwork)
    before = [driver.step(parts) for parts in STEPS]

    def short_of_memory(work: Callable[..., None]) -> Callable[..., None]:
        def launch(*args: Any, **named: Any) -> None:
            work(*args, **named)
            if torch.cuda.is_current_stream_capturing():
                raise torch.cuda.OutOfMemoryError("no more")

        return launch

    monkeypatch.setattr(network._decoder.step, "enqueue", short_of_memory(network._decoder.step.enqueue))
    monkeypatch.setattr(network._chunk_graphs, "_compute", short_of_memory(network._chunk_graphs._compute))
    assert driver.improve(idle=True) >= 10
    assert not network.improvable
    assert {*network._decoder._graphs.values(), *network._chunk_graphs._graphs.values()} == {None}
    for parts, logits in zip(STEPS, before, strict=True):
        assert torch.equal(driver.step(parts), logits), parts


@pytest.mark.parametrize("longest", [38, 39])
def test_long_sequences_decode_beside_prompts_by_kernels_that_split_their_keys(
    longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpserve.model.chunk_graphs._LONG_DECODE", longest)
    model = llama(*SHAPES[1])
    plain, fused = Driver(model, torch.float32, False), Driver(model, torch.float32, True)
    network = fused.network
    assert isinstance(network, FusedNetwork)
    for parts in ([(0, 0, 38), (1, 0, 10)], [(0, 38, 1), (1, 10, 30)]):
        expected, got = plain.step(parts), fused.step(parts)
        assert ((got - expected).norm() / expected.norm()).item() < 1e-5
    wanted = network._chunk_graphs.wanted
    assert wanted is not None
    assert (wanted.tokens, wanted.decodes) == ((32, 32) if longest == 38 else (32, 0))


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("others", [3, 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prompts_read_what_another_one_of_the_same_step_writes(dtype: torch.dtype, others: int, graphs: bool) -> None:
    """All but the last token of a prompt are the first ones of another: blocks are shared as soon as it is planned."""
    model = llama(*SHAPES[2])
    plain, fused = Driver(model, dtype, False), Driver(model, dtype, True)
    if graphs:
        fused.improve(idle=True)
    for tables in (plain.tables, fused.tables):
        tables[1 : others + 1, :8] = tables[0, :8]
    for _ in range(3):
        for driver in (plain, fused):
            driver.forget()
        parts = [*((row, 128, 1) for row in range(1, others + 1)), (0, 0, 129)]
        expected, got = plain.step(parts), fused.step(parts)
        assert ((got - expected).norm() / expected.norm()).item() < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.usefixtures("_hopper_rows")
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), SHAPES[::2])
def test_nothing_is_compiled_while_serving(
    dim: int, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel compiled in the middle stops everybody for a second."""
    import triton

    for name, module in list(sys.modules.items()):  # as if no test had been before
        if name.startswith("tpserve.model.kernels"):
            for kernel in vars(module).values():
                if isinstance(kernel, triton.runtime.JITFunction):
                    kernel.device_caches.clear()
    driver = Driver(llama(dim, heads, kv_heads), torch.bfloat16, True)
    compiled: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda *args, **named: compiled.append(named["repr"])
    )
    for tokens in (1, 2, 15, 16, 17, 63, 100):  # odd and even: the host's arrays lie differently
        for others in (0, 1, 2, 15, 16, 20, 33):
            parts = [(row, 50, 1) for row in range(others)]
            driver.step([*parts, (37, 0, tokens + 1)])
            driver.step([*parts, (37, 0, tokens + 1), (38, 3, tokens + 2)])
            driver.step([*parts, (37, 0, tokens + 1)], asked=False)
            driver.step([*parts, (39, 0, 1)])
    for prompts in (3, 16, 17, 30):
        driver.step([(row, 0, 40) for row in range(prompts)])
    for n in (1, 3, 300):
        logits, rows = torch.randn(n, 1000, device="cuda"), torch.zeros(n, dtype=torch.int64, device="cuda")
        for controls in (Row(), Row(top_p=0.9), Row(top_k=9, position=16)):
            driver.network.draw(logits, make_batch([controls] * n, 1000, device="cuda"), rows)
        driver.network.draw_greedy(logits, rows, rows)
    assert not compiled

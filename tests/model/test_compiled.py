"""The compiled decode step computes what the plain network computes."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.helpers.groups import with_
from tests.helpers.local import LocalEngine
from tests.helpers.stories import converted
from tpserve.engine.config import EngineConfig
from tpserve.engine.model_runner import ModelRunner
from tpserve.engine.protocol import RequestOutput
from tpserve.engine.sampling_params import SamplingParams
from tpserve.model import network
from tpserve.model.args import ModelArgs
from tpserve.model.attention import SequenceSlice
from tpserve.model.compiled import CompiledDecoder
from tpserve.model.huge_pages import consolidate
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.llama import Llama
from tpserve.model.network import CompiledNetwork, Network, PlainNetwork, StepInputs
from tpserve.model.quantized import quantize

pytestmark = [
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="this machine has no C++ compiler"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # torch's own compiler uses it
]
CPU = torch.device("cpu")
BLOCK, MAX_LEN, VOCAB = 4, 48, 100
ARGS = ModelArgs.from_params(
    {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": VOCAB, "multiple_of": 16, "norm_eps": 1e-5}
)


def llama() -> Llama:
    torch.manual_seed(0)
    model = Llama(ARGS, MAX_LEN)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.copy_(1 + 0.1 * torch.randn_like(weight))
            else:
                weight.normal_().mul_(weight.shape[1] ** -0.5)
    return model.eval()


class Driver:
    """A network with a cache of its own, full of what must not matter."""

    def __init__(
        self,
        model: Llama,
        dtype: torch.dtype,
        kind: type[PlainNetwork],
        scheme: str | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        model = copy.deepcopy(model).to(dtype)
        if scheme is not None:
            quantize(model, scheme)
        model.rope_PC2 = model.rope_PC2.float()
        cache = PagedKVCache(3, 30, BLOCK, 2, ARGS.head_dim, dtype=kv_dtype or dtype, device=CPU)
        for tensor in (*cache.k, *cache.v):
            tensor.copy_(torch.full_like(tensor, torch.nan, dtype=torch.float32))
        generator = torch.Generator().manual_seed(1)
        self.tokens = tokens = torch.randint(0, VOCAB, (2, MAX_LEN + 1), generator=generator)
        tables = torch.randperm(30, generator=generator)[:24].view(2, -1)
        consolidate(model)
        self.supported = CompiledDecoder.supports(model, 12)
        self.network = kind(model, cache, tokens, tables)
        self.network.warm_up()

    @torch.inference_mode()
    def prefill(self, row: int, n: int) -> torch.Tensor:
        inputs = StepInputs(
            torch.full((n,), row), torch.arange(n), [], [SequenceSlice(0, n)], None, torch.tensor([n - 1])
        )
        return self.network(inputs)

    @torch.inference_mode()
    def decode(self, row: int, position: int) -> torch.Tensor:
        inputs = StepInputs(torch.tensor([row]), torch.tensor([position]), [position + 1], [], None, None)
        return self.network(inputs)

    def all_logits(self) -> torch.Tensor:
        """Of two sequences that take turns: a prompt, then token by token to the last position."""
        logits = [self.prefill(0, 2), self.prefill(1, 9)]
        for step in range(2, MAX_LEN):
            logits.append(self.decode(0, step))
            if step >= 9:
                logits.append(self.decode(1, step))
        return torch.cat(logits).float()


@pytest.mark.parametrize(
    ("dtype", "scheme"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8"), (torch.float32, "fp8")],
)
def test_it_computes_what_the_plain_network_computes(dtype: torch.dtype, scheme: str | None) -> None:
    model = llama()
    exact = Driver(model, torch.float32, PlainNetwork, scheme).all_logits()
    plain = Driver(model, dtype, PlainNetwork, scheme).all_logits()
    compiled = Driver(model, dtype, CompiledNetwork, scheme)
    assert compiled.supported
    assert isinstance(compiled.network, CompiledNetwork)
    functions = counters["stats"]["unique_graphs"]
    ours = compiled.all_logits()
    assert counters["stats"]["unique_graphs"] == functions, "it was compiled again while it served"
    assert compiled.network.num_compiled_steps == len(ours) - 2
    assert not torch.equal(ours, plain)  # or nothing but the plain network ran
    if dtype is torch.float32:
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    else:
        assert (ours - exact).abs().mean() <= (plain - exact).abs().mean()  # activations stay float32


def test_a_float8_cache() -> None:
    model, kept = llama(), torch.float8_e4m3fn
    exact = Driver(model, torch.float32, PlainNetwork).all_logits()
    plain = Driver(model, torch.float32, PlainNetwork, kv_dtype=kept).all_logits()
    ours = Driver(model, torch.float32, CompiledNetwork, kv_dtype=kept).all_logits()
    # Sums in another order round some keys to the other neighbour.
    assert 0 < (ours - exact).norm() < 1.1 * (plain - exact).norm()
    assert (ours - plain).norm() < 0.5 * (plain - exact).norm()


@torch.inference_mode()
@pytest.mark.parametrize("kind", [CompiledNetwork, PlainNetwork])
def test_a_greedy_draw_is_the_first_of_the_most_probable(kind: type[PlainNetwork]) -> None:
    driver = Driver(llama(), torch.float32, kind)
    expected = driver.tokens.clone()
    for row, position, ids in ((0, 5, [7]), (1, 40, [99]), (1, 3, [60, 12, 61, 76]), (0, 6, list(range(VOCAB)))):
        logits_1V = torch.full((1, VOCAB), -1.0)
        logits_1V[0, ids] = 2.0
        drawn = driver.network.draw_greedy(logits_1V, torch.tensor([row]), torch.tensor([position]))
        expected[row, position] = min(ids)
        assert drawn.tolist() == [min(ids)]
        assert torch.equal(driver.tokens, expected)


def test_int4_goes_the_plain_way() -> None:
    assert not Driver(llama(), torch.float32, PlainNetwork, "int4").supported


def test_it_is_chosen_where_it_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the engine says the same with it, alone and in company."""
    monkeypatch.setattr(network, "WORTH_COMPILING_BYTES", 0)
    config = EngineConfig(checkpoint_dir=str(converted(tmp_path)), device="cpu", max_seq_len=128, self_test=False)

    def serve(fused: bool) -> tuple[Network, list[list[int]]]:
        engine = LocalEngine(with_(config, fused_kernels=fused))
        said: dict[str, list[int]] = {"a": [], "b": []}

        def take(name: str, output: RequestOutput) -> None:
            said[name] += output.token_ids

        for name, n, prompt in (("a", 60, [1, 403, 407]), ("b", 20, [1, 261])):
            params = SamplingParams(max_new_tokens=n, ignore_eos=True)
            engine.submit(name, prompt, params, lambda output, name=name: take(name, output))
        engine.run()
        runner = engine.core._runner
        assert isinstance(runner, ModelRunner)
        engine.core.close()
        return runner.network, list(said.values())

    compiled, ours = serve(True)
    plain_network, plain = serve(False)
    assert isinstance(compiled, CompiledNetwork)
    assert compiled.num_compiled_steps == 40  # those that "a" makes alone
    assert type(plain_network) is PlainNetwork
    assert ours == plain
    assert [len(ids) for ids in ours] == [60, 20]


def test_a_compiler_that_fails_costs_speed_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: CompiledDecoder) -> None:
        raise RuntimeError("Python.h: no such file\nmore")

    monkeypatch.setattr(CompiledDecoder, "compile", fail)
    driver = Driver(llama(), torch.float32, CompiledNetwork)
    assert "not compiled: Python.h: no such file" in caplog.text
    assert driver.decode(0, 0).shape == (1, VOCAB)
    assert isinstance(driver.network, CompiledNetwork)
    assert driver.network.num_compiled_steps == 0


def test_so_does_a_torch_that_keeps_its_code_elsewhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor import compile_fx

    real = compile_fx.compile_fx_inner
    monkeypatch.setattr(
        compile_fx, "compile_fx_inner", lambda graph, examples, **how: real(graph, examples, **how).__call__
    )
    driver = Driver(llama(), torch.float32, CompiledNetwork)
    assert "not compiled:" in caplog.text
    assert "keeps what it compiled in another place" in caplog.text
    assert driver.decode(0, 0).shape == (1, VOCAB)
    assert isinstance(driver.network, CompiledNetwork)
    assert driver.network.num_compiled_steps == 0

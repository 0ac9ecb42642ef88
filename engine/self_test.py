"""What a rank group does before it is ready: it computes a probe text, and holds it against what is known of it.

In this order; whatever one rank finds, all of them say, so that nobody waits for it:

1. Every weight of every rank is finite.
2. The probe's logits are finite, and the same on every rank.
3. Embedding, blocks and head are what the checkpoint's whole weights make of the same inputs: rank 0 reads them once
   more by `tpserve.convert`, without the plan and the slices, and computes the first tokens in float32 on the CPU. As
   many blocks as make `CHECKED_WEIGHTS`, spread over the network, at least one.
4. The steps that serve (paged cache, kernels, graphs, the device's queue) give the same log-probabilities: once as a
   prompt, once as a decode step.

Of random weights (`load_format: dummy`) only 1 and 2 can be asked. Shape suffixes as in `tpserve.model.llama`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tpserve.convert.errors import ConvertError
from tpserve.convert.open_any import open_any
from tpserve.convert.probe import CausalAttend, model_logits, plain_block, plain_norm, probe_tokens
from tpserve.convert.source import Source
from tpserve.convert.weights import Weight, raw_bytes
from tpserve.engine import sequence
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import SelfTestError
from tpserve.engine.model_runner import ModelRunner
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.step import ScheduledSequence, StepPlan
from tpserve.model.loader import LoadedModel
from tpserve.model.parallel import TensorParallel
from tpserve.model.quantized import is_quantized
from tpserve.model.rope import rope_table

CHECKED_WEIGHTS = 8 << 20  # of all blocks that are computed again: a fraction of a second of one core
_CHECKED_TOKENS = 8
# How far what a block adds to the residual stream may be from what it should be, of its length: several times what was
# seen, and several times less than when a rank holds another's slice (about 1).
_BLOCK_TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.05, "int8": 0.1, "fp8": 0.25, "int4": 0.6}
# How far log-probabilities may be from those of the plain network, of the largest logit.
_STEP_TOLERANCE = {"float32": 1e-2, "float16": 0.1, "bfloat16": 0.1, "fewer bits": 0.2, "fp8 KV": 0.5}
_MESSAGE_BYTES = 512

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the loaded network said.

    Attributes:
        tokens: of the probe text.
        logits_TV: float32, on the CPU.
        streams: the residual stream before every block and after the last, [T, D], float32, on the CPU; T are the first
            few tokens.
    """

    tokens: list[int]
    logits_TV: torch.Tensor
    streams: list[torch.Tensor]


def check_weights(loaded: LoadedModel, config: EngineConfig, source: Source | None) -> Probe:
    """The first three checks; all ranks together, when the weights are loaded.

    Args:
        loaded: this rank's part, quantised if it is to be.
        config: of the engine.
        source: what the weights were loaded from; None: a converted folder.

    Raises:
        SelfTestError: on every rank, with what the first of them found.
    """
    started_s = time.monotonic()
    tp, device = loaded.tp, loaded.device
    _tell(tp, device, _not_finite(loaded))
    most = min(config.max_seq_len, config.max_num_batched_tokens)
    probe = _compute(loaded, probe_tokens(loaded.info.args.vocab_size)[:most])
    _tell(tp, device, None if probe.logits_TV.isfinite().all() else _first_not_finite(probe))
    _agree(tp, device, probe.logits_TV)
    if config.load_format != "dummy":
        problem = None
        if tp.rank == 0:
            try:
                problem = _against(source or open_any(Path(config.checkpoint_dir)), loaded, config, probe)
            except ConvertError as e:
                problem = f"the weights cannot be read once more: {e}"
        _tell(tp, device, problem)
    logger.info("self-test: weights as they should be, %.2f s", time.monotonic() - started_s)
    return probe


def check_steps(runner: ModelRunner, loaded: LoadedModel, config: EngineConfig, probe: Probe) -> None:
    """The last check; all ranks together, when the KV cache is there and nothing is in it.

    Raises:
        SelfTestError: on every rank.
    """
    if config.load_format == "dummy" or len(probe.tokens) < 3:
        return
    started_s = time.monotonic()
    found, drawn = _serve(runner, probe.tokens, config.block_size)
    expected_TV = probe.logits_TV.log_softmax(-1)
    after = [*probe.tokens[1:], drawn]
    off = max(abs(logprob - float(expected_TV[i, after[i]])) for i, logprob in enumerate(found))
    kind = "fewer bits" if is_quantized(loaded.model) else _dtype_name(loaded)
    kind = "fp8 KV" if config.kv_cache_dtype == "fp8" else kind
    allowed = _STEP_TOLERANCE[kind] * max(1.0, float(probe.logits_TV.abs().max()))
    problem = None
    if not off <= allowed:  # not a number, too
        problem = (
            f"the steps that serve give log-probabilities that are off by {off:.3g} (allowed: {allowed:.3g}); "
            "fused_kernels and cuda_graphs may be switched off"
        )
    _tell(loaded.tp, loaded.device, problem)
    logger.info("self-test: steps as they should be, off by %.1e, %.2f s", off, time.monotonic() - started_s)


def _dtype_name(loaded: LoadedModel) -> str:
    return str(loaded.dtype).removeprefix("torch.")


def _not_finite(loaded: LoadedModel) -> str | None:
    """Every weight is looked at, also those that the probe does not reach, in one pass over the memory."""
    named = [(name, t) for name, t in loaded.model.state_dict().items() if t.dtype in (torch.float32, loaded.dtype)]
    # A sum is infinite or no number if one of its terms is; other ways make a copy.
    sums = torch.stack([t.sum(dtype=torch.float32) for _, t in named])
    bad = [name for (name, _), finite in zip(named, sums.isfinite().tolist(), strict=True) if not finite]
    return f"{bad[0]} holds values that are not finite" if bad else None


@torch.no_grad()
def _compute(loaded: LoadedModel, tokens: list[int]) -> Probe:
    streams: list[torch.Tensor] = []

    def keep(stream_TD: torch.Tensor) -> None:
        streams.append(stream_TD[:_CHECKED_TOKENS].float().cpu())

    first, *_ = layers = list(loaded.model.layers)
    hooks = [first.register_forward_pre_hook(lambda _, args: keep(args[0]))]
    hooks += [layer.register_forward_hook(lambda _, args, out: keep(out)) for layer in layers]
    try:
        logits_TV = model_logits(loaded.model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return Probe(tokens, logits_TV, streams)


def _first_not_finite(probe: Probe) -> str:
    for i, stream_TD in enumerate(probe.streams):
        if not stream_TD.isfinite().all():
            return "the embedding is not finite" if i == 0 else f"layer {i - 1} gives values that are not finite"
    return "the logits of the probe text are not finite"


def _agree(tp: TensorParallel, device: torch.device, logits_TV: torch.Tensor) -> None:
    if tp.size == 1:
        return
    own = torch.tensor([zlib.crc32(raw_bytes(logits_TV))], device=device)
    all_ = [torch.empty_like(own) for _ in range(tp.size)]
    dist.all_gather(all_, own, group=tp.group)
    sums = [int(one) for one in all_]
    others = [rank for rank, one in enumerate(sums) if one != sums[0]]
    if others:
        raise _error(f"rank {others[0]} computes other logits than rank 0")


def _against(source: Source, loaded: LoadedModel, config: EngineConfig, probe: Probe) -> str | None:
    """What is wrong with the network by the whole weights of `source`; None: nothing."""
    by_name = {tensor.name: tensor for tensor in source.tensors}
    args, dtype = loaded.info.args, loaded.dtype
    tolerance = _BLOCK_TOLERANCE[_dtype_name(loaded)]
    tokens = probe.tokens[:_CHECKED_TOKENS]
    embedded_TD = _rows(by_name["tok_embeddings.weight"], tokens, dtype)
    off = _off(probe.streams[0], embedded_TD, torch.zeros_like(embedded_TD), dtype)
    if not off <= tolerance:
        return _says("the embedding", off, tolerance)
    of_blocks = _BLOCK_TOLERANCE[config.quantization or loaded.info.quantization or _dtype_name(loaded)]
    rope_TC2 = rope_table(args, len(tokens), "cpu")
    for i in _checked_layers(by_name, args.n_layers):
        before_TD, found_TD = probe.streams[i : i + 2]
        with torch.no_grad():
            expected_TD = plain_block(args, i, by_name, dtype)(before_TD, rope_TC2, CausalAttend())
        off = _off(found_TD, expected_TD, before_TD, dtype)
        if not off <= of_blocks:
            return _says(f"layer {i}", off, of_blocks)
    ids = list(dict.fromkeys(probe.tokens))
    norm = plain_norm(args, by_name, dtype)
    with torch.no_grad():
        expected_TN = F.linear(norm(probe.streams[-1]), _rows(by_name["output.weight"], ids, dtype))
    off = _off(probe.logits_TV[: len(tokens), ids], expected_TN, torch.zeros_like(expected_TN), dtype)
    return None if off <= tolerance else _says("the head", off, tolerance)


def _checked_layers(by_name: Mapping[str, Weight], n_layers: int) -> list[int]:
    one = sum(torch.Size(w.shape).numel() for name, w in by_name.items() if name.startswith("layers.0."))
    count = max(1, min(n_layers, CHECKED_WEIGHTS // one))
    return [(2 * i + 1) * n_layers // (2 * count) for i in range(count)]


def _off(found: torch.Tensor, expected: torch.Tensor, before: torch.Tensor, dtype: torch.dtype) -> float:
    """How far a stream is from what it should be, of the length of what was to be added to `before`; the worst token.

    What the type rounds off the stream itself, which may be much longer, does not count.
    """
    rounding_T = 2 * torch.finfo(dtype).eps * torch.maximum(before.norm(dim=-1), expected.norm(dim=-1))
    off_T = ((found - expected).norm(dim=-1) - rounding_T).clamp(min=0)
    return float((off_T / (expected - before).norm(dim=-1).clamp(min=1e-12)).nan_to_num(nan=torch.inf).max())


def _rows(weight: Weight, ids: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([weight.read(0, i, i + 1, dtype) for i in ids]).float()


def _says(what: str, off: float, tolerance: float) -> str:
    return (
        f"{what} computes something else than the checkpoint's weights do: it is off by {off:.2%} (allowed: "
        f"{tolerance:.2%})"
    )


def _serve(runner: ModelRunner, tokens: list[int], block_size: int) -> tuple[list[float], int]:
    """Log-probabilities of what follows each token, and the token drawn after the last."""
    n = len(tokens)
    params = SamplingParams(max_new_tokens=1, temperature=0.0, logprobs=0, prompt_logprobs=0)
    seq = sequence.Sequence("self-test", tokens, params, max_seq_len=n + 1, eos_token_ids=())
    seq.block_table, seq.row = list(range(-(-n // block_size))), 0
    prompt = StepPlan([ScheduledSequence(seq, 0, n - 1, (), [])], loads=[seq], num_prompt_logits=n - 1)
    decode = StepPlan([ScheduledSequence(seq, n - 1, 1, (seq,), [])])
    results = []
    for plan in (prompt, decode):
        step = runner.launch(plan)
        runner.draw(step, None)
        results.append(runner.finish(step))
    assert results[1].logprobs is not None
    return [one.logprob for one in results[0].prompt_logprobs[0]] + results[1].logprobs, results[1].tokens[0]


def _tell(tp: TensorParallel, device: torch.device, problem: str | None) -> None:
    """Raises on every rank what any of them found; as plain bytes: nothing that ranks send each other is unpickled."""
    if tp.size == 1:
        if problem is not None:
            raise _error(problem)
        return
    said = (problem or "").encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    own = torch.frombuffer(bytearray(said), dtype=torch.uint8).to(device)
    all_ = [torch.empty_like(own) for _ in range(tp.size)]
    dist.all_gather(all_, own, group=tp.group)
    for rank, one in enumerate(all_):
        text = bytes(one.tolist()).rstrip(b"\0").decode(errors="replace")
        if text:
            raise _error(f"rank {rank}: {text}")


def _error(problem: str) -> SelfTestError:
    return SelfTestError(
        f"self-test: {problem}. `tpserve verify` looks at the whole checkpoint; if that is sound, a device, its memory "
        "or this program is at fault. With self_test: false the server starts all the same"
    )

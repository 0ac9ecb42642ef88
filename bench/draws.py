"""Random draws by kernels beside torch's, on a GPU: `python -m tpserve.bench.draws`.

Both are given the same logits, and must draw the same tokens. "device" is a draw's time within a CUDA graph, where
nothing waits for the host; "wall" that of launching it again and again, as a step does: the larger of the two is what
it costs. Logits are nearly equal ("flat", as random weights give them) or far apart ("peaked", as a trained model's).

Exit status 1: a token differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import fire
import torch

from tpserve.bench.attention import time_us
from tpserve.bench.record import write_result
from tpserve.model.kernels.draw import GreedyDraws
from tpserve.model.kernels.random_draw import RandomDraws
from tpserve.model.logits import SamplingBatch
from tpserve.model.sampling import draw

_CONTROLS: dict[str, dict[str, float]] = {
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 0.6, "top_p": 0.9},
    "top_k": {"temperature": 0.8, "top_k": 50},
    "top_k, top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
}
_SCALES = {"flat": 0.1, "peaked": 4.0}  # standard deviation of the logits


def device_us(call: Callable[[], object]) -> float:
    """Of one of twenty calls in a graph."""
    return time_us([call] * 20)


def wall_us(call: Callable[[], object], calls: int = 100) -> float:
    """Of one of many calls, launched one behind the other."""
    call()
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - started_s) / calls


def rows_of(n: int, vocab_size: int, controls: dict[str, float]) -> SamplingBatch:
    """As many rows with the same controls and seeds of their own."""

    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((n,), value, dtype=dtype, device="cuda")

    top_k, top_p = int(controls.get("top_k", 0)), controls.get("top_p", 1.0)
    return SamplingBatch(
        temperature_N=full(controls["temperature"], torch.float32),
        top_k_N=full(top_k or vocab_size, torch.int64),
        top_p_N=full(top_p, torch.float64),
        min_p_N=full(0.0, torch.float32),
        seed_N=torch.randint(2**62, (n,), device="cuda"),
        position_N=full(5, torch.int64),
        any_random=True,
        any_filter=bool(top_k or top_p < 1),
        any_min_p=False,
        max_top_k=top_k or None,
        largest_top_k=top_k,
    )


def main(vocab_sizes: tuple[int, ...] = (32000, 128256), rows: tuple[int, ...] = (1, 8, 64, 256)) -> None:
    """Compares and times; writes `bench/results/draws-<device>.json`.

    Args:
        vocab_sizes: of the logits.
        rows: sequences that draw together.
    """
    torch.manual_seed(int(time.time()))
    measured: list[dict[str, Any]] = []
    for v in vocab_sizes:
        for kind, scale in _SCALES.items():
            for n in rows:
                logits_NV = torch.randn(n, v, device="cuda") * scale
                tokens_RL = torch.zeros(n, 8, dtype=torch.int64, device="cuda")
                rows_N = torch.arange(n, device="cuda")
                greedy, draws = GreedyDraws(n, tokens_RL), RandomDraws(n, v, tokens_RL)
                for name, controls in _CONTROLS.items():
                    batch = rows_of(n, v, controls)
                    ways: dict[str, Callable[[], torch.Tensor]] = {
                        "torch": lambda: draw(logits_NV, batch, rows_N, tokens_RL),  # noqa: B023
                        "ours": lambda: draws(logits_NV, batch, rows_N),  # noqa: B023
                    }
                    if not torch.equal(ways["ours"](), ways["torch"]()):
                        raise SystemExit(f"{v} tokens, {n} rows, {kind}, {name}: another token")
                    row: dict[str, Any] = {"controls": name, "logits": kind, "vocabulary": v, "rows": n}
                    for way, call in ways.items():
                        row |= {f"{way} {clock.__name__}": round(clock(call), 1) for clock in (device_us, wall_us)}
                    # As behind a decode step, whose graph ends with the greedy draws.
                    greedy(logits_NV, rows_N, batch.position_N)
                    behind_us = device_us(lambda: draws(logits_NV, batch, rows_N, greedy))  # noqa: B023
                    measured.append(row | {"behind greedy device_us": round(behind_us, 1)})
                    print(measured[-1], flush=True)
    gpu = torch.cuda.get_device_name().replace(" ", "-")
    write_result(f"draws-{gpu}", "python -m tpserve.bench.draws", {"rows": measured})


if __name__ == "__main__":
    fire.Fire(main)

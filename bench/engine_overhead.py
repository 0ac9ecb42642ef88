"""What the engine costs beside the network: `python -m tpserve.bench.engine_overhead [--tp 1]`.

The real client, sockets, step loop, scheduler, batch state and sampler, around a network that computes nothing
(`stub_worker`). A row of the table: so many sequences decode, each with so much history; the time of a step is that
between two steps of the loop, tokens are counted where a user's callback gets them. The sampler draws from the bundled
model's vocabulary. The longest history shows whether anything in a step grows with it.

Exit status 1: at 256 sequences fewer than 50,000 tokens a second arrive.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fire

from tpserve.bench.record import write_result
from tpserve.convert.convert import convert
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.protocol import RequestOutput
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.supervisor import RankGroup

LIMIT = 50_000
_DEMO = Path(__file__).resolve().parents[1] / "model_store" / "demo"
_MAX_LEN = 8192


class _Counter:
    """Counts the tokens that a user is handed."""

    def __init__(self) -> None:
        self.tokens = 0

    def take(self, output: RequestOutput) -> None:
        self.tokens += len(output.token_ids)


def measure(client: EngineClient, sequences: int, history: int, temperature: float, seconds: float) -> dict[str, Any]:
    """Runs `sequences` streams over prompts of `history` tokens and measures once all of them decode."""
    counter = _Counter()
    names = [f"{sequences}/{history}/{temperature}/{i}" for i in range(sequences)]
    for i, name in enumerate(names):
        # The same tokens but for the first: nothing is shared, and every sequence is as long.
        prompt = [5 + i, *[7] * (history - 1)]
        params = SamplingParams(max_new_tokens=_MAX_LEN, ignore_eos=True, temperature=temperature, top_p=1.0, seed=i)
        client.submit(name, prompt, params, counter.take)
    deadline_s = time.monotonic() + 60
    while counter.tokens < 20 * sequences and time.monotonic() < deadline_s:
        time.sleep(0.01)
    step, tokens, start_s = client.status().ranks[0].step, counter.tokens, time.monotonic()
    time.sleep(seconds)
    end_step, end_tokens, elapsed_s = client.status().ranks[0].step, counter.tokens, time.monotonic() - start_s
    for name in names:
        client.cancel(name)
    while any(rank.num_blocks_in_use for rank in client.status().ranks):
        time.sleep(0.01)
    return {
        "sequences": sequences,
        "history": history,
        "sampled": temperature > 0,
        "step_us": round(1e6 * elapsed_s / (end_step - step)),
        "tokens_per_s": round((end_tokens - tokens) / elapsed_s),
    }


def main(tp: int = 1, seconds: float = 2.0) -> None:
    """Measures and prints the table.

    Args:
        tp: ranks; on few cores they compete with each other and with the client.
        seconds: of each row.
    """
    with tempfile.TemporaryDirectory(prefix="tpserve-bench-") as folder:
        rows = _measure_all(convert(_DEMO, Path(folder) / "demo", progress=False), tp, seconds)
    print(f"{'sequences':>9} {'history':>8} {'sampled':>8} {'µs/step':>8} {'tokens/s':>9}")
    for row in rows:
        print(f"{row['sequences']:>9} {row['history']:>8} {row['sampled']!s:>8} {row['step_us']:>8} "
              f"{row['tokens_per_s']:>9,}")  # fmt: skip
    worst = min(row["tokens_per_s"] for row in rows if row["sequences"] == 256 and not row["sampled"])
    write_result(
        "engine_overhead",
        f"python -m tpserve.bench.engine_overhead --tp {tp}",
        {"tensor_parallel_size": tp, "limit_tokens_per_s": LIMIT, "rows": rows},
    )
    sys.exit(worst < LIMIT)


def _measure_all(checkpoint: Path, tp: int, seconds: float) -> list[dict[str, Any]]:
    RankGroup.worker = "tpserve.bench.stub_worker"
    config = EngineConfig(
        checkpoint_dir=str(checkpoint), tensor_parallel_size=tp, device="cpu", standby=False, max_num_seqs=256,
        max_num_batched_tokens=8192, max_seq_len=_MAX_LEN,
    )  # fmt: skip
    client = EngineClient(config)
    client.start()
    try:
        return [
            measure(client, sequences, history, temperature, seconds)
            for sequences in (1, 64, 256)
            for history, temperature in ((100, 0.0), (4000, 0.0), (100, 1.0))
        ]
    finally:
        client.close()


if __name__ == "__main__":
    fire.Fire(main)

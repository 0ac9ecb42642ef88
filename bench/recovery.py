"""From the SIGKILL of a rank to the next token of a stream, with and without a standby group.

`python -m tpserve.bench.recovery`
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import fire

from tpserve.bench.convert_memory import write_result
from tpserve.bench.streams import converted, engine
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.protocol import RequestOutput
from tpserve.engine.sampling_params import SamplingParams

_DEMO = Path(__file__).resolve().parents[1] / "model_store" / "demo"
_MAX_LEN = 2048


def recovery(client: EngineClient, number: int) -> tuple[float, float]:
    """Kills the last rank in the middle of a stream; seconds until that was noticed, and until the next token."""
    token_s: list[float] = []

    def take(output: RequestOutput) -> None:
        token_s.extend([time.monotonic()] * len(output.token_ids))

    params = SamplingParams(max_new_tokens=_MAX_LEN - 8, ignore_eos=True)
    client.submit(str(number), [3, 4, 5], params, take)
    while len(token_s) < 20:
        time.sleep(0.005)
    killed_s = time.monotonic()
    os.kill(client.rank_pids[-1], signal.SIGKILL)
    while client.ready:
        time.sleep(0.001)
    noticed_s, before = time.monotonic(), len(token_s)
    while len(token_s) == before:
        time.sleep(0.001)
    client.cancel(str(number))
    return noticed_s - killed_s, token_s[before] - killed_s


def measure(checkpoint: str, tp: int, device: str, standby: bool, rounds: int, pause_s: float) -> dict[str, Any]:
    """Medians over the rounds, and the slowest one."""
    config = EngineConfig(
        checkpoint_dir=checkpoint, tensor_parallel_size=tp, device=device, max_seq_len=_MAX_LEN, standby=standby,
        restart_window_s=1.0,  # or the client would wait longer and longer, and give up
    )  # fmt: skip
    noticed_s, token_s = [], []
    with engine(config) as client:
        for number in range(rounds):
            time.sleep(pause_s)  # the standby has to be launched, too
            noticed, token = recovery(client, number)
            noticed_s.append(noticed)
            token_s.append(token)
    return {
        "standby": standby,
        "noticed_s": round(statistics.median(noticed_s), 3),
        "next_token_s": round(statistics.median(token_s), 2),
        "slowest_s": round(max(token_s), 2),
    }


def main(model: str = str(_DEMO), tp: int = 2, device: str = "cpu", rounds: int = 5, pause_s: float = 12.0) -> None:
    """Measures and writes the row.

    Args:
        model: a folder of shards, or a converted one.
        tp: ranks.
        device: of the ranks.
        rounds: kills, each with and without a standby group.
        pause_s: before each.
    """
    with converted(model) as folder:
        rows = [measure(folder, tp, device, standby, rounds, pause_s) for standby in (True, False)]
    command = f"python -m tpserve.bench.recovery --tp {tp} --device {device} --rounds {rounds}"
    write_result(f"recovery-{device}", command, {"tensor_parallel_size": tp, "rounds": rounds, "rows": rows})


if __name__ == "__main__":
    fire.Fire(main)

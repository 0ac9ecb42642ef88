"""From the SIGKILL or SIGSTOP of a rank to the next token of a stream, with and without a standby group.

`python -m tpserve.bench.recovery`
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import fire

from tpserve.bench.engine_runs import MODELS
from tpserve.bench.record import write_result
from tpserve.bench.streams import converted, engine
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.protocol import RequestOutput
from tpserve.engine.sampling_params import SamplingParams
from tpserve.model.args import ModelArgs
from tpserve.model.checkpoint import CheckpointInfo

_DEMO = Path(__file__).resolve().parents[1] / "model_store" / "demo"
_MAX_LEN = 2048
HOW = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def recovery(client: EngineClient, number: int, how: signal.Signals) -> tuple[float, float]:
    """Signals the last rank in the middle of a stream; seconds until that was noticed, and until the next token."""
    token_s: list[float] = []

    def take(output: RequestOutput) -> None:
        token_s.extend([time.monotonic()] * len(output.token_ids))

    params = SamplingParams(max_new_tokens=_MAX_LEN - 8, ignore_eos=True)
    client.submit(str(number), [3, 4, 5], params, take)
    while len(token_s) < 20:
        time.sleep(0.005)
    killed_s = time.monotonic()
    os.kill(client.rank_pids[-1], how)
    while client.ready:
        time.sleep(0.001)
    noticed_s, before = time.monotonic(), len(token_s)
    while len(token_s) == before:
        time.sleep(0.001)
    client.cancel(str(number))
    return noticed_s - killed_s, token_s[before] - killed_s


def measure(config: EngineConfig, how: str, rounds: int, pause_s: float) -> dict[str, Any]:
    """Medians over the rounds, and the slowest one; on GPUs, what of their memory is used, too."""
    noticed_s, token_s = [], []
    memory = {"before": _gpu_memory_mib()}
    with engine(config) as client:
        memory["serving"] = _gpu_memory_mib()
        for number in range(rounds):
            time.sleep(pause_s)  # the standby has to be launched, too
            noticed, token = recovery(client, number, HOW[how])
            noticed_s.append(noticed)
            token_s.append(token)
        memory["recovered"] = _gpu_memory_mib()
    memory["closed"] = _gpu_memory_mib()
    row = {
        "how": how,
        "standby": config.standby,
        "noticed_s": round(statistics.median(noticed_s), 3),
        "next_token_s": round(statistics.median(token_s), 2),
        "slowest_s": round(max(token_s), 2),
    }
    if memory["before"]:
        row["gpu_memory_mib"] = memory
    print(row, flush=True)
    return row


def _gpu_memory_mib() -> list[int]:
    """Used memory of each GPU; empty where there is none."""
    try:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return [int(line) for line in subprocess.run(query, capture_output=True, text=True).stdout.split()]
    except (FileNotFoundError, ValueError):
        return []


def main(
    model: str = str(_DEMO),
    tp: int = 2,
    device: str = "cpu",
    rounds: int = 5,
    pause_s: float = 12.0,
    how: str = "kill",
    step_timeout_s: float = 5.0,
    without: bool = True,
) -> None:
    """Measures and writes the rows.

    Args:
        model: a folder of shards, or a converted one, or a key of `engine_runs.MODELS`: random weights.
        tp: ranks.
        device: of the ranks.
        rounds: of each row.
        pause_s: before each.
        how: keys of `HOW`, with commas.
        step_timeout_s: of silence until a group is taken for hung.
        without: whether to measure without a standby group as well.
    """
    hows = how.split(",") if isinstance(how, str) else list(how)  # fire makes a tuple of "a,b"
    with contextlib.ExitStack() as stack:
        if model in MODELS:
            folder, load_format = stack.enter_context(tempfile.TemporaryDirectory()), "dummy"
            CheckpointInfo(ModelArgs.from_params(MODELS[model]), "bfloat16").write(Path(folder))
        else:
            folder, load_format = stack.enter_context(converted(model)), "auto"
        rows = [
            measure(
                EngineConfig(
                    checkpoint_dir=folder, load_format=load_format, tensor_parallel_size=tp, device=device,
                    max_seq_len=_MAX_LEN, standby=standby, step_timeout_s=step_timeout_s,
                    restart_window_s=1.0,  # or the client would wait longer and longer, and give up
                ),
                each, rounds, pause_s,
            )
            for each in hows for standby in ((True, False) if without else (True,))
        ]  # fmt: skip
    name = f"recovery-{device}" if model not in MODELS else f"recovery-{device}-{model}-tp{tp}"
    command = f"python -m tpserve.bench.recovery --tp {tp} --device {device} --rounds {rounds} --how {','.join(hows)}"
    command += f" --model {model}" if model in MODELS else ""
    write_result(name, command, {"tensor_parallel_size": tp, "rounds": rounds, "rows": rows})


if __name__ == "__main__":
    fire.Fire(main)

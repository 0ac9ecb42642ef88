"""What HTTP costs: `python -m tpserve.bench.fronts [--streams 64 --rate 5000]`.

A rank that computes nothing (`stub_worker`) makes tokens at a fixed rate. They are counted where a user of the engine's
client gets them, and then at the far end of as many HTTP streams: through TorchServe and through `tpserve serve`, in
our own protocol (a JSON object a line) and in OpenAI's (events). Streams begin together; the rate is all tokens by the
time from the first request to the last byte. Clients share the machine with the servers.

With `--model 7B` the engine is the real one, at the rate that it has, around random weights of that shape; there is no
tokenizer then, and our own protocol is the only one.

Exit status 1: a front delivers less than 90 % of what the engine alone does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fire

from tpserve.bench.engine_runs import MODELS
from tpserve.bench.record import write_result
from tpserve.bench.streams import DEMO_MODEL, Stream
from tpserve.convert.convert import convert
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.supervisor import RankGroup
from tpserve.handler.archive import archive, default_config
from tpserve.handler.server_process import TorchServeProcess
from tpserve.model.args import ModelArgs
from tpserve.model.checkpoint import CheckpointInfo

LIMIT = 0.9
_MAX_LEN = 2048
_PROMPT = "Once upon a time"


def engine_rate(checkpoint: Path, streams: int, new: int, rounds: int, options: dict[str, Any]) -> list[float]:
    """Tokens a second of the client alone, a round each."""
    config = EngineConfig(
        checkpoint_dir=str(checkpoint), max_num_seqs=streams, max_seq_len=_MAX_LEN, standby=False, **options
    )
    client = EngineClient(config)
    client.start()
    try:
        return [_engine_round(client, streams, new) for _ in range(rounds + 1)][1:]
    finally:
        client.close()


def _engine_round(client: EngineClient, streams: int, new: int) -> float:
    params = SamplingParams(max_new_tokens=new, ignore_eos=True)
    started_s = time.perf_counter()
    running = [Stream(f"{started_s}/{i}", [5, 6, 7, 8 + i], params).submit(client) for i in range(streams)]
    tokens = sum(len(stream.wait()) for stream in running)
    return tokens / (time.perf_counter() - started_s)


async def _one(port: int, path: str, body: bytes) -> int:
    """One streamed request; returns how many bytes it was told."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{path}: {status!r} {await reader.read(2000)!r}")
    total = 0
    tail = b""
    # TorchServe keeps the connection open: the last chunk says that this is all.
    while not tail.endswith(b"0\r\n\r\n"):
        data = await reader.read(1 << 16)
        if not data:
            raise RuntimeError(f"{path}: ended in the middle")
        total += len(data)
        tail = (tail + data)[-8:]
    writer.close()
    return total


def http_round(port: int, path: str, body: dict[str, Any], streams: int, new: int) -> float:
    """Tokens a second at the far end of `streams` connections."""
    data = json.dumps(body).encode()

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(_one(port, path, data) for _ in range(streams)))

    started_s = time.perf_counter()
    sizes = asyncio.run(all_of_them())
    elapsed_s = time.perf_counter() - started_s
    assert min(sizes) > 10 * new, "a stream was told too little"
    return streams * new / elapsed_s


@contextlib.contextmanager
def torchserve(checkpoint: Path, folder: Path, streams: int, options: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """TorchServe's port, and where the protocols' paths begin."""
    import yaml

    content = yaml.safe_load(default_config(dim=32).read_text())
    content["batchSize"] = 2 * streams
    content["deviceType"] = "cpu" if options["device"] == "cpu" else "gpu"
    content["handler"] |= {"max_batch_size": streams, "max_seq_len": _MAX_LEN, "max_new_tokens": _MAX_LEN, **options}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    made = archive(checkpoint, config=config, export_path=folder / "store", tensor_parallel_size=1)
    server = TorchServeProcess(folder / "store", [made.models], disable_system_metrics="true")
    try:
        server.wait_until_ready()
        yield server.port, f"/predictions/{server.models[0]}/1.0/"
    finally:
        server.stop()
        server.remove()


@contextlib.contextmanager
def second_front(checkpoint: Path, streams: int, options: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """The port of `tpserve serve`, and where the protocols' paths begin."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [
        sys.executable, "-m", "tpserve.cli.main", "serve", "--checkpoint", str(checkpoint), "--port", "0",
        "--max_batch_size", str(streams), "--max_seq_len", str(_MAX_LEN), "--max_new_tokens", str(_MAX_LEN),
        "--served_model_name", "llama", *words,
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            yield int(line.rpartition(":")[2]), "/"
        finally:
            process.terminate()


def main(
    streams: int = 64,
    rate: int = 5000,
    new: int = 400,
    rounds: int = 3,
    model: str = "",
    dtype: str = "bfloat16",
    device: str = "cuda",
    fronts: str = "TorchServe,tpserve serve",
) -> None:
    """Measures and prints the table.

    Args:
        streams: at once.
        rate: tokens a second that the engine makes.
        new: tokens of a stream.
        rounds: of each; their median counts.
        model: a key of `engine_runs.MODELS`, instead of the rank that computes nothing; with `dtype` and `device`.
        fronts: with commas between them.
    """
    options: dict[str, Any] = {"device": "cpu"}
    bodies: list[tuple[str, str, dict[str, Any]]] = []
    predictions = {"max_new_tokens": new, "ignore_eos": True}
    if model:
        options = {"device": device, "dtype": dtype, "load_format": "dummy"}
        bodies.append(("predictions", "", {"prompt_token_ids": [5, 6, 7, 8], **predictions}))
    else:
        os.environ["TPSERVE_WORKER"] = RankGroup.worker = "tpserve.bench.stub_worker"
        os.environ["TPSERVE_STUB_STEP_MS"] = str(1e3 * streams / rate)
        bodies.append(("predictions", "", {"prompt": _PROMPT, **predictions}))
        asked = {"model": "llama", "prompt": _PROMPT, "max_tokens": new, "ignore_eos": True, "stream": True}
        bodies.append(("OpenAI", "v1/completions", asked))
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="tpb-") as name:
        folder = Path(name)
        if model:
            checkpoint = folder / "random"
            checkpoint.mkdir()
            CheckpointInfo(ModelArgs.from_params(MODELS[model]), dtype).write(checkpoint)
        else:
            checkpoint = convert(DEMO_MODEL, folder / "demo", progress=False)
        rates["engine alone"] = engine_rate(checkpoint, streams, new, rounds, options)
        for front in str(fronts).split(",") if isinstance(fronts, str) else fronts:  # fire makes a tuple of a list
            if front == "TorchServe":
                context = torchserve(checkpoint, folder, streams, options)
            else:
                context = second_front(checkpoint, streams, options)
            with context as (port, base):
                for protocol, path, body in bodies:
                    place = base + path if path or front == "TorchServe" else "/predictions/llama"
                    measured = [http_round(port, place, body, streams, new) for _ in range(rounds + 1)]
                    rates[f"{front}, {protocol}"] = measured[1:]
    alone = statistics.median(rates["engine alone"])
    medians = {name: statistics.median(measured) for name, measured in rates.items()}
    rows = {name: {"tokens_per_s": median, "share": median / alone} for name, median in medians.items()}
    for name, row in rows.items():
        print(f"{name:28}{row['tokens_per_s']:>9,.0f} tokens/s{row['share']:>8.1%}")
    command = f"python -m tpserve.bench.fronts {' '.join(sys.argv[1:])}".strip()
    write_result(
        f"fronts_{model}" if model else "fronts",
        command,
        {"streams": streams, "rate": None if model else rate, "new": new, "model": model, "rows": rows},
    )
    sys.exit(min(row["share"] for row in rows.values()) < LIMIT)


if __name__ == "__main__":
    fire.Fire(main)

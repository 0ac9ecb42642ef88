"""A trace of real arrivals on the engine: `python -m tpserve.bench.engine_trace --trace FILE [--model DIR]`.

FILE is in the format of the Azure LLM inference traces 2023 (https://github.com/Azure/AzurePublicDataset): a CSV with
TIMESTAMP, ContextTokens, GeneratedTokens. Its requests are scaled to a small model:

- lengths of prompts are divided by `--shrink_prompts`, of answers by `--shrink_outputs`, to at least 1 token; prompts
  are cut where both together exceed the context;
- arrivals keep their pattern, and are squeezed so that requests come at `--load` times the rate at which the same group
  works off the first `--calibration` requests when all are there at once.

Prompts are random tokens; every fourth begins with one of four prefixes of 32 tokens. Half of the requests are greedy,
half are sampled. The KV cache is so small that requests must be preempted. Times count from arrival. Afterwards some
requests are repeated alone and must say the same.

Exit status 1: a request was lost, ended otherwise than by length, got a wrong number of tokens or said something else
alone; blocks were left allocated; or nothing was preempted.
"""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path
from typing import Any

import fire
import numpy as np

from tpserve.bench.record import write_result
from tpserve.bench.serve_arrivals import Arrival, read_trace
from tpserve.bench.streams import DEMO_MODEL, Stream, converted, engine, percentiles_ms, settled_heartbeat
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.sampling_params import SamplingParams

_PATIENCE_S = 300.0  # after the last submission
_PREFIX_TOKENS, _NUM_PREFIXES = 32, 4
_HOW: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8},
    {"repetition_penalty": 1.1},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 50},
)


def streams_of(arrivals: list[Arrival], vocab_size: int, seed: int) -> list[Stream]:
    """Requests with those lengths."""
    rng = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(n)]  # 0 to 2 are unknown, begin and end

    prefixes = [tokens(_PREFIX_TOKENS) for _ in range(_NUM_PREFIXES)]
    streams = []
    for i, arrival in enumerate(arrivals):
        prefix = prefixes[i // 4 % _NUM_PREFIXES] if i % 4 == 0 else []
        prompt = (prefix + tokens(arrival.num_prompt_tokens))[: arrival.num_prompt_tokens]
        params = SamplingParams(
            max_new_tokens=arrival.num_output_tokens, ignore_eos=True, seed=i, **_HOW[rng.randrange(4)]
        )
        streams.append(Stream(f"{seed}-{i}", prompt, params))
    return streams


def replay(client: EngineClient, streams: list[Stream], arrivals: list[Arrival], squeeze: float) -> float:
    """Submits each stream at its time divided by `squeeze`, and waits for all, lost ones not for ever.

    Returns:
        The seconds that it took.
    """
    started_s = time.monotonic()
    for stream, arrival in zip(streams, arrivals, strict=True):
        due_s = started_s + arrival.at_s / squeeze
        time.sleep(max(0.0, due_s - time.monotonic()))
        stream.submit(client, due_s)
    patience_s = time.monotonic() + _PATIENCE_S
    for stream in streams:
        with contextlib.suppress(TimeoutError):  # `faults` counts it
            stream.wait(max(0.0, patience_s - time.monotonic()))
    return time.monotonic() - started_s


def faults(client: EngineClient, streams: list[Stream]) -> dict[str, int]:
    """What must not happen, counted; call it when all streams should have ended."""
    wrong = sum(len(stream.token_ids) != stream.params.max_new_tokens for stream in streams)
    return {
        "lost": sum(stream.finish_reason is None for stream in streams),
        "ended_otherwise": sum(stream.finish_reason != "length" for stream in streams),
        "wrong_number_of_tokens": wrong,
        "blocks_left": sum(rank.num_blocks_in_use for rank in client.status().ranks),
        "restarts": client.num_restarts,
    }


def differences_alone(client: EngineClient, streams: list[Stream]) -> int:
    """Repeats streams one by one; how many say something else."""
    differences = 0
    for stream in streams:
        alone = Stream(f"alone-{stream.request_id}", stream.prompt, stream.params).submit(client)
        differences += alone.wait() != stream.token_ids
    return differences


def main(
    trace: str,
    model: str = str(DEMO_MODEL),
    requests: int = 1000,
    shrink_prompts: float = 16.0,
    shrink_outputs: float = 6.0,
    load: float = 0.7,
    tp: int = 2,
    max_seq_len: int = 512,
    num_kv_blocks: int = 256,
    block_size: int = 4,
    calibration: int = 200,
    device: str = "cpu",
) -> None:
    """Measures one replay.

    Args:
        trace: the CSV file.
        model: a converted checkpoint folder, or one with Meta's shards.
        requests: so many lines of the trace.
        shrink_prompts: lengths of prompts are divided by it.
        shrink_outputs: lengths of answers are divided by it.
        load: arrivals come at this multiple of the measured capacity.
        tp: number of ranks.
        max_seq_len: the context.
        num_kv_blocks: size of the KV cache.
        block_size: of a block, in tokens; small ones make running sequences ask for more often.
        calibration: so many requests measure the capacity.
        device: of the ranks.
    """
    arrivals = read_trace(Path(trace), requests, shrink_prompts, shrink_outputs, max_seq_len)
    with converted(model) as folder:
        config = EngineConfig(
            checkpoint_dir=folder,
            tensor_parallel_size=tp,
            device=device,
            standby=False,
            max_seq_len=max_seq_len,
            max_num_seqs=64,
            max_num_batched_tokens=256,
            max_num_waiting=max(requests, calibration),
            num_kv_blocks=num_kv_blocks,
            block_size=block_size,
        )
        with engine(config) as client:
            figures = _measure(client, arrivals, load, calibration)
    figures = {"requests": requests, "tp": tp, "kv_cache_tokens": num_kv_blocks * block_size, **figures}
    command = (
        f"python -m tpserve.bench.engine_trace --trace {Path(trace).name} --model {Path(model).name} "
        f"--requests {requests} --shrink_prompts {shrink_prompts:g} --shrink_outputs {shrink_outputs:g} "
        f"--load {load:g} --tp {tp} --max_seq_len {max_seq_len} --num_kv_blocks {num_kv_blocks} "
        f"--block_size {block_size} --calibration {calibration}"
    )
    write_result("engine_trace", command, figures)
    if any(figures["faults"].values()) or not figures["preemptions"]:
        raise SystemExit(1)


def _measure(client: EngineClient, arrivals: list[Arrival], load: float, calibration: int) -> dict[str, Any]:
    vocab_size = client.checkpoint.args.vocab_size
    first = arrivals[:calibration]
    calibrated_s = replay(client, streams_of(first, vocab_size, 1), [Arrival(0, 1, 1)] * len(first), 1.0)
    capacity_rps = len(first) / calibrated_s
    squeeze = load * capacity_rps * arrivals[-1].at_s / len(arrivals)
    before = settled_heartbeat(client)
    streams = streams_of(arrivals, vocab_size, 2)
    seconds = replay(client, streams, arrivals, squeeze)
    counted = faults(client, streams)
    after = settled_heartbeat(client)
    sample = random.Random(3).sample(streams, min(50, len(streams)))
    counted["said_something_else_alone"] = differences_alone(client, sample)
    num_output_tokens = sum(len(stream.token_ids) for stream in streams)
    queries = after.prefix_cache_queries - before.prefix_cache_queries
    return {
        "prompt_tokens_mean_and_max": _mean_and_max([a.num_prompt_tokens for a in arrivals]),
        "output_tokens_mean_and_max": _mean_and_max([a.num_output_tokens for a in arrivals]),
        "capacity_requests_per_s": round(capacity_rps, 2),
        "load": load,
        "arrivals_squeezed_by": round(squeeze, 2),
        "seconds": round(seconds, 1),
        "output_tokens_per_s": round(num_output_tokens / seconds, 1),
        "time_to_first_token_ms": percentiles_ms(stream.first_token_s for stream in streams),
        "inter_token_latency_ms": percentiles_ms(gap for stream in streams for gap in stream.gaps_s()),
        "end_to_end_ms": percentiles_ms(stream.end_to_end_s for stream in streams),
        "preemptions": after.num_preemptions - before.num_preemptions,
        "prefix_cache_hit_rate": round((after.prefix_cache_hits - before.prefix_cache_hits) / queries, 4),
        "faults": counted,
    }


def _mean_and_max(values: list[int]) -> list[float]:
    return [round(float(np.mean(values)), 1), max(values)]


if __name__ == "__main__":
    fire.Fire(main)

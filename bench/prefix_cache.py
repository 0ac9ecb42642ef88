"""What a shared prefix costs: `python -m tpserve.bench.prefix_cache [--model DIR]`.

Requests whose prompts have a long beginning in common, all at once and one after another, on two groups that are up at
the same time: one with the prefix cache, one without. They take turns, every round with a fresh prefix. Counted: prompt
tokens that were computed (those that the cache had taken off). Only full blocks are shared, and each request computes
the rest of its prompt itself: "prefix_computed" is how often the shared blocks were computed, mean of the rounds.

Exit status 1: the shared blocks were computed more than once, what requests and heartbeats say of the cache differs, or
an answer is not the one without the cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import fire

from tpserve.bench.record import write_result
from tpserve.bench.streams import DEMO_MODEL, Stream, converted, engine, percentiles_ms, settled_heartbeat
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.sampling_params import SamplingParams

WAYS = ("all_at_once", "one_after_another")
_BLOCK_SIZE = 16
_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Round:
    """What one round of requests saw.

    Attributes:
        answers: their tokens.
        first_token_s: time to each one's first token, seconds.
        num_computed_tokens: of their prompts, as they were told.
        num_computed_heard: likewise, from the heartbeats.
    """

    answers: list[list[int]]
    first_token_s: list[float]
    num_computed_tokens: int
    num_computed_heard: int


def prompts_with_prefix(n: int, prefix_tokens: int, own_tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random prompts that begin alike."""
    rng = random.Random(seed)
    prefix = [rng.randrange(3, vocab_size) for _ in range(prefix_tokens)]
    return [prefix + [rng.randrange(3, vocab_size) for _ in range(own_tokens)] for _ in range(n)]


def run_round(client: EngineClient, prompts: list[list[int]], new_tokens: int, way: str) -> Round:
    """Runs the prompts in one of the `WAYS`, greedy and sampled ones in turns."""
    before = settled_heartbeat(client)
    streams = []
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, temperature=0.9 * (i % 2), seed=i)
        streams.append(Stream(f"prefix-{next(_numbers)}", prompt, params).submit(client))
        if way == "one_after_another":
            streams[-1].wait()
    answers = [stream.wait() for stream in streams]
    after = settled_heartbeat(client)
    asked = after.prefix_cache_queries - before.prefix_cache_queries
    return Round(
        answers,
        [stream.first_token_s for stream in streams],
        sum(len(stream.prompt) - stream.num_cached_tokens for stream in streams),
        asked - (after.prefix_cache_hits - before.prefix_cache_hits),
    )


def times_computed(num_computed_tokens: int, prompts: list[list[int]], prefix_tokens: int, block_size: int) -> float:
    """How often the shared blocks were computed, when each request computed the rest of its prompt itself."""
    shared = prefix_tokens // block_size * block_size
    return (num_computed_tokens - sum(len(prompt) - shared for prompt in prompts)) / shared


def main(
    model: str = str(DEMO_MODEL),
    requests: int = 64,
    prefix_tokens: int = 300,
    own_tokens: int = 12,
    new_tokens: int = 8,
    rounds: int = 2,
    tp: int = 2,
    device: str = "cpu",
) -> None:
    """Measures with and without the cache in one run.

    Args:
        model: a converted checkpoint folder, or one with Meta's shards.
        requests: of a round.
        prefix_tokens: that all prompts of a round begin with.
        own_tokens: of each prompt after them.
        new_tokens: of each answer.
        rounds: of each kind.
        tp: number of ranks of each group.
        device: of the ranks.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(converted(model))
        clients = {
            cached: stack.enter_context(
                engine(
                    EngineConfig(
                        checkpoint_dir=folder,
                        tensor_parallel_size=tp,
                        device=device,
                        max_seq_len=512,
                        standby=False,
                        max_num_batched_tokens=256,
                        block_size=_BLOCK_SIZE,
                        enable_prefix_caching=cached,
                    )
                )
            )
            for cached in (True, False)
        }
        figures: dict[str, Any] = {"requests": requests, "prefix_tokens": prefix_tokens, "tp": tp, "rounds": rounds}
        faults = 0
        for way in WAYS:
            figures[way], way_faults = _measure(clients, way, (requests, prefix_tokens, own_tokens, new_tokens), rounds)
            faults += way_faults
        figures["faults"] = faults
    command = (
        f"python -m tpserve.bench.prefix_cache --model {Path(model).name} --requests {requests} "
        f"--prefix_tokens {prefix_tokens} --own_tokens {own_tokens} --new_tokens {new_tokens} "
        f"--rounds {rounds} --tp {tp}"
    )
    write_result("prefix_cache", command, figures)
    if faults:
        raise SystemExit(1)


def _measure(
    clients: dict[bool, EngineClient], way: str, sizes: tuple[int, int, int, int], rounds: int
) -> tuple[dict[str, Any], int]:
    requests, prefix_tokens, own_tokens, new_tokens = sizes
    vocab_size = clients[True].checkpoint.args.vocab_size
    seen: dict[bool, list[Round]] = {True: [], False: []}
    computed: dict[bool, list[float]] = {True: [], False: []}
    faults = 0
    for number in range(rounds):
        prompts = prompts_with_prefix(requests, prefix_tokens, own_tokens, vocab_size, next(_numbers))
        for cached in (True, False) if number % 2 else (False, True):
            done = run_round(clients[cached], prompts, new_tokens, way)
            seen[cached].append(done)
            computed[cached].append(times_computed(done.num_computed_tokens, prompts, prefix_tokens, _BLOCK_SIZE))
            faults += done.num_computed_tokens != done.num_computed_heard
        faults += seen[True][-1].answers != seen[False][-1].answers
    faults += sum(times != 1 for times in computed[True])
    figures: dict[str, Any] = {}
    for cached, name in ((True, "with"), (False, "without")):
        figures[name] = {
            "prefix_computed": sum(computed[cached]) / rounds,
            "prompt_tokens_computed": sum(done.num_computed_tokens for done in seen[cached]) // rounds,
            "time_to_first_token_ms": percentiles_ms(s for done in seen[cached] for s in done.first_token_s),
        }
    times = [figures[name]["time_to_first_token_ms"] for name in ("without", "with")]
    figures["first_token_sooner"] = {point: round(times[0][point] / times[1][point], 2) for point in times[0]}
    return figures, faults


if __name__ == "__main__":
    fire.Fire(main)

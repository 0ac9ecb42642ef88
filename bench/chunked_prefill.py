"""What long prompts do to running streams: `python -m tpserve.bench.chunked_prefill [--model DIR]`.

Streams decode while prompts of `--prompt_tokens` random tokens (nothing to find in the prefix cache) keep arriving, so
that one is always waiting. Two groups are up at the same time: one with chunked prefill, whose step computes at most
`--max_num_batched_tokens` tokens, and one without, whose step computes a whole prompt. They take turns, each first with
its streams alone and then with the prompts, so that noise of the machine meets all four. The time between a stream's
tokens is the time of a step; a growth factor is a percentile with the prompts over the same percentile alone, just
before, in the median of the rounds.

The device's own time of a step is measured beside it, from the engine's trace. It is a constant plus a time for each
token; both follow from steps with and without whole prompts, and say how long a step of `max_num_batched_tokens` tokens
should take: that bounds the growth with chunks, however long the prompts are.

Exit status 1: a stream got a wrong number of tokens, or chunking did not lower the growth of the median and the p99.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from pathlib import Path
from typing import Any

import fire
import numpy as np

from tpserve.bench.record import write_result
from tpserve.bench.streams import DEMO_MODEL, Stream, converted, engine, percentiles_ms
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.protocol import RankTrace
from tpserve.engine.sampling_params import SamplingParams

_IN_FLIGHT = 4  # prompts: steps are planned ahead, and the next prompt must be there when they are
_TRACED_STEPS = 40
_POINTS = (50, 99, 100)
_numbers = itertools.count()


class Prompts:
    """Keeps prompts in flight while the block runs, each for one token: whenever one ends, the next arrives.

    Args:
        client: started.
        num_tokens: of each prompt; 0: there are none.
        rng: draws them.

    Attributes:
        num_ended: so far.
    """

    def __init__(self, client: EngineClient, num_tokens: int, rng: random.Random) -> None:
        self.num_ended = 0
        self._client, self._num_tokens, self._rng = client, num_tokens, rng
        self._begun, self._over = threading.Event(), False
        self._open = threading.Semaphore(0)  # one for each that has ended and has no successor

    def __enter__(self) -> Prompts:
        if self._num_tokens:
            for _ in range(_IN_FLIGHT):
                self._submit()
            if not self._begun.wait(60):
                raise TimeoutError("no prompt was computed within 60 s")
        return self

    def __exit__(self, *raised: object) -> None:
        self._over = True
        for _ in range(_IN_FLIGHT if self._num_tokens else 0):
            self._open.acquire(timeout=60)

    def _submit(self) -> None:
        vocab_size = self._client.checkpoint.args.vocab_size
        prompt = [self._rng.randrange(3, vocab_size) for _ in range(self._num_tokens)]
        params = SamplingParams(max_new_tokens=1, ignore_eos=True)
        Stream(f"prompt-{next(_numbers)}", prompt, params, self._ended).submit(self._client)

    def _ended(self, _: Stream) -> None:  # in the client's thread
        self.num_ended += 1
        self._begun.set()
        if self._over:
            self._open.release()
        else:
            self._submit()


class Phase:
    """What one kind of round measured, over all its rounds; seconds."""

    def __init__(self) -> None:
        self.gaps_s: list[list[float]] = []  # by round
        self.steps_s: list[float] = []
        self.tokens: list[int] = []
        self.num_prompts = 0
        self.num_faults = 0

    def run(self, client: EngineClient, num_streams: int, num_tokens: int, prompt_tokens: int, seed: int) -> None:
        """One round: streams of `num_tokens` tokens, beside prompts of `prompt_tokens` (0: alone)."""
        rng = random.Random(seed)
        params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
        prompts = [[rng.randrange(3, 500) for _ in range(8)] for _ in range(num_streams)]
        streams = [Stream(f"stream-{next(_numbers)}", p, params).submit(client) for p in prompts]
        for stream in streams:
            stream.wait_begun()
        with Prompts(client, prompt_tokens, rng) as arriving:
            begun_s = max(stream.heard_s[-1] for stream in streams)
            before = arriving.num_ended
            self._add(client.trace(_TRACED_STEPS))
            for stream in streams:
                stream.wait()
            self.num_prompts += arriving.num_ended - before
        self.gaps_s.append([gap for stream in streams for gap in stream.gaps_s(begun_s)])
        self.num_faults += sum(len(stream.token_ids) != num_tokens for stream in streams)

    def figures(self) -> dict[str, Any]:
        """For the table."""
        return {
            "gap_ms": percentiles_ms(itertools.chain(*self.gaps_s), _POINTS),
            "device_step_ms": percentiles_ms(self.steps_s, (50, 99)),
            "tokens_a_step_p50": float(np.median(self.tokens)),
            "prompts": self.num_prompts,
        }

    def _add(self, traces: list[RankTrace]) -> None:
        spans = traces[0].spans
        self.steps_s += [span.duration_ns / 1e9 for span in spans if span.track == "device"]
        self.tokens += [span.about["tokens"] for span in spans if span.name == "launch"]


def main(
    model: str = str(DEMO_MODEL),
    streams: int = 8,
    stream_tokens: int = 60,
    prompt_tokens: int = 400,
    max_num_batched_tokens: int = 64,
    rounds: int = 8,
    tp: int = 2,
    device: str = "cpu",
) -> None:
    """Measures both ways in one run.

    Args:
        model: a converted checkpoint folder, or one with Meta's shards.
        streams: so many decode.
        stream_tokens: so many tokens each in a round.
        prompt_tokens: of each prompt that arrives.
        max_num_batched_tokens: of a step with chunked prefill.
        rounds: of each of the four kinds.
        tp: number of ranks of each group.
        device: of the ranks.
    """
    kinds = {"chunked": True, "whole": False}
    phases = {f"{name}_{what}": Phase() for name in kinds for what in ("alone", "with_prompts")}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(converted(model))
        clients = {}
        for name, chunked in kinds.items():
            config = EngineConfig(
                checkpoint_dir=folder,
                tensor_parallel_size=tp,
                device=device,
                max_seq_len=512,
                standby=False,
                max_num_seqs=streams + _IN_FLIGHT,
                max_num_batched_tokens=max_num_batched_tokens if chunked else 512,
                enable_chunked_prefill=chunked,
            )
            clients[name] = stack.enter_context(engine(config))
        for number, (name, client) in itertools.product(range(rounds), clients.items()):
            phases[f"{name}_alone"].run(client, streams, stream_tokens, 0, number)
            phases[f"{name}_with_prompts"].run(client, streams, stream_tokens, prompt_tokens, number)
    figures: dict[str, Any] = {"streams": streams, "prompt_tokens": prompt_tokens, "tp": tp, "rounds": rounds}
    figures |= {name: phase.figures() for name, phase in phases.items()}
    for name in kinds:
        figures[f"{name}_growth"] = _growth(phases[f"{name}_with_prompts"], phases[f"{name}_alone"])
    figures["chunked_growth"]["device_step_expected"] = _expected_growth(figures)
    figures["faults"] = sum(phase.num_faults for phase in phases.values())
    command = (
        f"python -m tpserve.bench.chunked_prefill --model {Path(model).name} --streams {streams} "
        f"--stream_tokens {stream_tokens} --prompt_tokens {prompt_tokens} "
        f"--max_num_batched_tokens {max_num_batched_tokens} --rounds {rounds} --tp {tp}"
    )
    write_result("chunked_prefill", command, figures)
    few, many = figures["chunked_growth"], figures["whole_growth"]
    print(
        f"\nBeside prompts the median gap grows {few['p50']:g}-fold with chunks, {many['p50']:g}-fold without.\n"
        f"The device's step grows {few['device_step_p50']:g}-fold and {many['device_step_p50']:g}-fold. By the cost of "
        f"a step and of a token without\nchunks, {max_num_batched_tokens} tokens should cost "
        f"{few['device_step_expected']:g} times what {streams} cost: max_num_batched_tokens bounds the growth with\n"
        "chunks, the length of the longest prompt the growth without."
    )
    if figures["faults"] or not all(few[point] < many[point] for point in ("p50", "p99")):
        raise SystemExit(1)


def _expected_growth(figures: dict[str, Any]) -> float:
    """Of a step with chunks over one alone, from the two points of the group without chunks."""
    alone, loaded, chunked = (figures[name] for name in ("whole_alone", "whole_with_prompts", "chunked_with_prompts"))
    few, many = alone["tokens_a_step_p50"], loaded["tokens_a_step_p50"]
    start_ms = alone["device_step_ms"]["p50"]
    token_ms = (loaded["device_step_ms"]["p50"] - start_ms) / (many - few)
    return round(float(1 + token_ms * (chunked["tokens_a_step_p50"] - few) / start_ms), 2)


def _growth(loaded: Phase, alone: Phase) -> dict[str, float]:
    rounds = [
        (percentiles_ms(with_prompts, _POINTS), percentiles_ms(without, _POINTS))
        for with_prompts, without in zip(loaded.gaps_s, alone.gaps_s, strict=True)
    ]
    growth = {point: float(np.median([a[point] / b[point] for a, b in rounds])) for point in rounds[0][0]}
    growth["device_step_p50"] = float(np.median(loaded.steps_s) / np.median(alone.steps_s))
    growth["tokens_a_step"] = float(np.median(loaded.tokens) / np.median(alone.tokens))
    return {name: round(factor, 2) for name, factor in growth.items()}


if __name__ == "__main__":
    fire.Fire(main)

"""One run against a server: requests go out at their times, whatever became of those before. Free of torch."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import random
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tpserve.bench.serve_arrivals import Arrival, Texts, random_ids
from tpserve.bench.serve_events import Answer
from tpserve.bench.serve_http import Client
from tpserve.bench.serve_metrics import summarise
from tpserve.engine.errors import ConfigError

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_SLEEP_SHORT_S = 0.001  # asyncio's timers are this late: the rest is waited for by yielding


@dataclasses.dataclass(frozen=True)
class Asking:
    """How a server is asked.

    Attributes:
        endpoint: "completions" or "chat".
        model: as the server calls it; empty: the first that it lists.
        texts: makes prompts as text; None: token ids are sent, which "chat" does not take and TGI neither.
        vocab_size: token ids are below it.
        fields: further ones of every request's body.
        api_key: sent as a bearer token.
        max_concurrency: no more requests at once; 0: as many as there are. Times count from when one is let through.
        timeout_s: of one request.
        warmup: requests before the measured ones, one after another.
    """

    endpoint: str = "completions"
    model: str = ""
    texts: Texts | None = None
    vocab_size: int = 256
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    api_key: str = ""
    max_concurrency: int = 0
    timeout_s: float = 600.0
    warmup: int = 2

    def __post_init__(self) -> None:
        if self.endpoint not in PATHS:
            raise ConfigError(f"endpoint must be one of {', '.join(PATHS)}, got {self.endpoint!r}")
        if self.endpoint == "chat" and self.texts is None:
            raise ConfigError("a chat's messages are text: name the model's --tokenizer, so that lengths can be made")


def load_texts(path: str) -> Texts:
    """From a tokenizer's file, or the folder it is in.

    Raises:
        ConfigError: there is none.
    """
    from tpserve.engine.text.load import checkpoint_tokenizer, load_tokenizer
    from tpserve.engine.text.tokenizer import TokenizerError

    try:
        place = Path(path)
        tokenizer = checkpoint_tokenizer(place) if place.is_dir() else load_tokenizer(place)
        if tokenizer is None:
            raise ConfigError(f"{path} has no tokenizer")
        return Texts(tokenizer)
    except (TokenizerError, OSError, ValueError) as e:
        raise ConfigError(f"--tokenizer {path}: {e}") from None


def bodies(asking: Asking, arrivals: Sequence[Arrival], model: str, content_seed: int) -> list[bytes]:
    """Every request, encoded before the first is sent.

    Args:
        asking: how.
        arrivals: lengths.
        model: its name.
        content_seed: of the prompts' content; another one makes other prompts, which no prefix cache knows.
    """
    if asking.texts is None:
        prompts: list[Any] = list(random_ids(arrivals, asking.vocab_size, content_seed))
    else:
        rng = random.Random(content_seed)
        prompts = [asking.texts.make(arrival.num_prompt_tokens, rng) for arrival in arrivals]
    common = {
        "model": model, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0,
        "ignore_eos": True, **asking.fields,
    }  # fmt: skip
    made = []
    for prompt, arrival in zip(prompts, arrivals, strict=True):
        content = {"prompt": prompt} if asking.endpoint == "completions" else {"messages": [_message(prompt)]}
        made.append(json.dumps({**common, **content, "max_tokens": arrival.num_output_tokens}).encode())
    return made


def _message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def run(
    url: str,
    asking: Asking,
    arrivals: Sequence[Arrival],
    objectives: dict[str, float],
    label: str = "requests",
    before: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Figures of `summarise`, of one run.

    Args:
        url: the server's.
        asking: how.
        arrivals: when, and lengths.
        objectives: of the goodput.
        label: of the progress bar.
        before: called when all is ready; the schedule begins when it returns.

    Raises:
        ConfigError: nobody answers there, or no request was answered.
    """
    try:
        client = Client(url, asking.api_key, asking.timeout_s)
    except ValueError as e:
        raise ConfigError(str(e)) from None
    return asyncio.run(_run(client, url, asking, arrivals, objectives, label, before))


async def _run(
    client: Client,
    url: str,
    asking: Asking,
    arrivals: Sequence[Arrival],
    objectives: dict[str, float],
    label: str,
    before: Callable[[], None],
) -> dict[str, Any]:
    try:
        return await _measured(client, url, asking, arrivals, objectives, label, before)
    finally:
        await client.close()


async def _measured(
    client: Client,
    url: str,
    asking: Asking,
    arrivals: Sequence[Arrival],
    objectives: dict[str, float],
    label: str,
    before: Callable[[], None],
) -> dict[str, Any]:
    model = asking.model or await _first_model(client, url)
    content_seed = secrets.randbits(32)
    path = PATHS[asking.endpoint]
    for body in bodies(asking, arrivals[: asking.warmup], model, content_seed + 1):
        answer = await client.stream(path, body, time.perf_counter())
        if answer.error:
            raise ConfigError(f"{url}{path}: {answer.error}")
    encoded = bodies(asking, arrivals, model, content_seed)
    gc.collect()
    gc.freeze()  # a collection in the middle would be told as the server's latency
    with tqdm(total=len(arrivals), desc=label, unit="req", leave=False, dynamic_ncols=True) as bar:
        before()
        started_s = time.perf_counter()
        answers = await _all(client, path, encoded, arrivals, started_s, asking.max_concurrency, bar)
    gc.unfreeze()
    figures = summarise(answers, started_s, objectives)
    if figures["failed"] == len(answers):
        raise ConfigError(f"{url}{path}: no request was answered: {'; '.join(figures['errors'])}")
    return {"model": model, **figures}


async def _all(
    client: Client,
    path: str,
    encoded: Sequence[bytes],
    arrivals: Sequence[Arrival],
    started_s: float,
    max_concurrency: int,
    bar: Any,
) -> list[Answer]:
    let_through = asyncio.Semaphore(max_concurrency) if max_concurrency else None

    async def one(body: bytes, due_s: float) -> Answer:
        if let_through is None:
            answer = await client.stream(path, body, due_s)
        else:
            async with let_through:
                answer = await client.stream(path, body, max(due_s, time.perf_counter()))
        bar.update()
        return answer

    tasks = []
    for body, arrival in zip(encoded, arrivals, strict=True):
        due_s = started_s + arrival.at_s
        while (left_s := due_s - time.perf_counter()) > 0:
            await asyncio.sleep(left_s - _SLEEP_SHORT_S if left_s > _SLEEP_SHORT_S else 0)
        tasks.append(asyncio.create_task(one(body, due_s)))
        await asyncio.sleep(0)  # it is sent now
    return await asyncio.gather(*tasks)


async def _first_model(client: Client, url: str) -> str:
    try:
        status, body = await client.get("/v1/models")
        if status != 200:
            raise ConfigError(f"{url}/v1/models: status {status}: {body[:300].decode(errors='replace')}")
        return str(json.loads(body)["data"][0]["id"])
    except (OSError, TimeoutError) as e:
        raise ConfigError(f"nobody answers at {url}: {e}") from None
    except (ValueError, LookupError, TypeError) as e:
        raise ConfigError(f"{url}/v1/models names no model ({e}): say --model") from None

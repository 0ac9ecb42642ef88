"""`tpserve eval perplexity`: how well a served model predicts a text, by the engine's own log-probabilities.

A text gets a BOS where the model's prompts have one, and goes through the engine in windows, as prompts whose
log-probabilities are asked for: what is judged is what serves, at any number of ranks, quantised or not.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tpserve.bench.eval_documents import read_texts, windows
from tpserve.bench.record import markdown, write_json
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError, EngineError
from tpserve.engine.options import split_options
from tpserve.engine.requests import GenerateRequest
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.session import Session, progress_bar

SEPARATOR = "<|endoftext|>"
_IN_FLIGHT = 16


def perplexity(
    checkpoint: str,
    text: str,
    tp: int = 1,
    window: int = 1024,
    stride: int = 0,
    separator: str = SEPARATOR,
    field: str = "text",
    json: str = "",
    **options: Any,
) -> None:
    """Measures perplexity of a text: the exponential of the mean negative log-likelihood of its tokens.

    Args:
        checkpoint: a checkpoint of any form.
        text: a text file, or .jsonl with a text a line.
        tp: tensor-parallel size.
        window: tokens that the model sees at once, at most its context.
        stride: tokens from one window's beginning to the next one's; default: half of it.
        separator: cuts a text file into documents; empty: it is one.
        field: of the .jsonl file's objects.
        json: a file for the figures, of each document too.
        options: keys of the engine's configuration (dtype, device, quantization, …).
    """
    stride = stride or window // 2
    if window < 2 or not 1 <= stride < window:
        raise ConfigError(f"stride must be from 1 to window - 1, got a window of {window} and a stride of {stride}")
    engine, sampling = split_options(options)
    if sampling:
        raise ConfigError(f"{next(iter(sampling))} has no meaning here: nothing is generated")
    settings = {
        "checkpoint_dir": checkpoint, "tensor_parallel_size": tp, "standby": False, "max_seq_len": window + 1,
        "enable_prefix_caching": False, **engine,
    }  # fmt: skip
    texts = read_texts(Path(text), separator, field)
    session = Session(EngineConfig.from_dict(settings))
    if session.tokenizer is None:
        raise ConfigError(f"{checkpoint} has no tokenizer")
    ids = [session.tokenizer.encode(one, bos=True, eos=False) for one in texts]
    with session:
        started_s = time.perf_counter()
        nats = nats_of(session, ids, window, stride)
        seconds = time.perf_counter() - started_s
        device = session.info.device
    documents = [
        {"tokens": len(one) - 1, "bytes": len(its.encode()), "nats_a_token": value / max(1, len(one) - 1)}
        for one, its, value in zip(ids, texts, nats, strict=True)
    ]
    figures = _figures(nats, [len(one) - 1 for one in ids], sum(len(its.encode()) for its in texts))
    about = {
        "checkpoint": Path(checkpoint).name, "text": Path(text).name, "tp": tp, "device": device, "window": window,
        "stride": stride, "options": engine, "threads_a_rank": int(os.environ.get("OMP_NUM_THREADS", "0")),
    }  # fmt: skip
    print(table(f"{Path(checkpoint).name}, TP {tp}, {device}", figures, len(texts), window, stride, seconds))
    if json:
        whole = about | figures | {"seconds": seconds, "documents": documents}
        write_json(Path(json), " ".join(["tpserve", *sys.argv[1:]]), whole)
        print(f"\n{json}")


def nats_of(session: Session, documents: Sequence[Sequence[int]], window: int, stride: int) -> list[float]:
    """Negative log-likelihood of each document's tokens after its first, in nats.

    Args:
        session: started; its context holds a window and one token more.
        documents: token ids.
        window, stride: see `windows`.

    Raises:
        EngineError: the group failed.
    """
    pieces = [(i, *piece) for i, ids in enumerate(documents) for piece in windows(len(ids), window, stride)]
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=0)

    def requests() -> Iterator[GenerateRequest]:
        for number, first, end, _ in pieces:
            yield GenerateRequest(list(documents[number][first:end]), params)

    terms: list[list[float]] = [[] for _ in documents]
    with progress_bar(len(pieces), "reading", "window") as bar:
        for asked in session.ask(requests(), _IN_FLIGHT):
            if not asked.completion.finished:
                continue
            if asked.completion.error is not None:
                raise EngineError(asked.completion.error)
            number, first, end, scored = pieces[asked.index]
            logprobs = asked.completion.prompt_logprobs
            assert logprobs is not None
            assert len(logprobs) == end - first
            terms[number] += [-one.logprob for one in logprobs[scored - first :] if one is not None]
            bar.update()
    for one, ids in zip(terms, documents, strict=True):
        assert len(one) == max(0, len(ids) - 1), "a token was not predicted once"
    return [math.fsum(one) for one in terms]


def _figures(nats: Sequence[float], tokens: Sequence[int], num_bytes: int) -> dict[str, Any]:
    total, count = math.fsum(nats), sum(tokens)
    if not count:
        raise ConfigError("the text has no token that another stands before")
    mean = total / count
    return {
        "tokens": count, "nats_a_token": mean, "perplexity": math.exp(mean),
        "bits_a_byte": total / math.log(2) / num_bytes,
    }  # fmt: skip


def table(name: str, figures: dict[str, Any], documents: int, window: int, stride: int, seconds: float) -> str:
    """As Markdown."""
    header = [f"window {window}, stride {stride}", "documents", "tokens", "nats a token", "perplexity", "bits a byte",
              "tokens/s"]  # fmt: skip
    shown = [f"{figures[key]:.4f}" for key in ("nats_a_token", "perplexity", "bits_a_byte")]
    return markdown(header, [[name, documents, figures["tokens"], *shown, figures["tokens"] / seconds]])

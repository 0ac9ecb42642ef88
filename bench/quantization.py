"""What fewer bits cost and save on a CPU: `python -m tpserve.bench.quantization [--stories DIR --text FILE]`.

Quality: mean negative log-likelihood, in nats a token, of the bundled demo model on tales that its float32 weights tell
(sampled at temperature 1, so the difference to float32's estimates the divergence of what is served from what was
trained), and of any other checkpoint on a text (split at `<|endoftext|>`). Each is converted with `--quantize`, loaded
from what was written, and computed in bfloat16, but for the first row.

Speed: the whole engine with random weights of a 110M model's shapes, one stream; engines take turns, round by round,
and what counts is the ratio to bfloat16's in the same round. `generate` is the difference of a long and a short request
a token, `prefill` a prompt's tokens by the time to its first one.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import fire
import torch

from tpserve.bench.engine_runs import MODELS, Engine
from tpserve.bench.record import markdown, write_json
from tpserve.convert.convert import convert
from tpserve.convert.layout import global_shape, parameter_names
from tpserve.convert.probe import model_logits
from tpserve.engine.text.load import checkpoint_tokenizer
from tpserve.model.args import ModelArgs
from tpserve.model.attention import PagedAttention, SequenceSlice
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.loader import LoadedModel, load_model
from tpserve.model.quantized import weight_bytes
from tpserve.model.quantized_format import format_of

DEMO = Path(__file__).resolve().parents[1] / "model_store" / "demo"
RESULT = Path(__file__).resolve().parent / "results" / "quantization-cpu.json"
# Name: type of weights and activations, scheme of the blocks' matrices, type of keys and values.
KINDS: dict[str, tuple[str, str | None, str]] = {
    "float32": ("float32", None, "auto"),
    "bfloat16": ("bfloat16", None, "auto"),
    "int8": ("bfloat16", "int8", "auto"),
    "int4": ("bfloat16", "int4", "auto"),
    "fp8": ("bfloat16", "fp8", "auto"),
    "fp8 KV": ("bfloat16", None, "fp8"),
}
_BLOCK, _TALES, _TALE_TOKENS, _PROMPT, _SHORT = 16, 8, 160, 128, 8


@torch.inference_mode()
def nll(loaded: LoadedModel, texts: list[list[int]], kv_dtype: torch.dtype) -> float:
    """Mean negative log-likelihood of tokens after their first, in nats."""
    args, total, count = loaded.info.args, 0.0, 0
    for ids in texts:
        tokens = torch.tensor(ids)
        n = len(ids) - 1
        blocks = -(-n // _BLOCK)
        cache = PagedKVCache(
            args.n_layers, blocks, _BLOCK, args.n_kv_heads, args.head_dim, dtype=kv_dtype, device=loaded.device
        )
        positions, table = torch.arange(n), torch.arange(blocks)[None]
        attend = PagedAttention(cache, table, torch.zeros_like(positions), positions, [], [SequenceSlice(0, n)])
        logits = loaded.model(tokens[:-1], positions, attend)
        total += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").item()
        count += n
    return total / count


def tales(loaded: LoadedModel, bos: int) -> list[list[int]]:
    """What the model says by itself."""
    generator, told = torch.Generator().manual_seed(0), []
    for _ in range(_TALES):
        ids = [bos]
        while len(ids) <= _TALE_TOKENS:
            logits = model_logits(loaded.model, ids)[-1]
            ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
        told.append(ids)
    return told


def quality(checkpoint: Path, text: Path | None, folder: Path) -> list[dict[str, Any]]:
    """A row a kind: bytes of weights on disk and in memory, and the likelihood.

    Args:
        checkpoint: any that is converted.
        text: None: the model's own.
        folder: to convert in.
    """
    rows: list[dict[str, Any]] = []
    texts: list[list[int]] = []
    for kind, (dtype, scheme, kv) in KINDS.items():
        made = convert(checkpoint, folder / kind, dtype=dtype, quantize=scheme, progress=False)
        loaded = load_model(made)
        if not texts:
            tokenizer = checkpoint_tokenizer(made)
            assert tokenizer is not None, "a text needs a tokenizer"
            if text is None:
                texts = tales(loaded, tokenizer.bos_id)
            else:
                parts = text.read_text(encoding="utf-8").split("<|endoftext|>")
                texts = [tokenizer.encode(part.strip(), bos=True, eos=False)[:512] for part in parts if part.strip()]
        figure = nll(loaded, texts, torch.float8_e4m3fn if kv == "fp8" else loaded.dtype)
        rows.append({
            "kind": kind, "nll": figure, "perplexity": math.exp(figure), "tokens": sum(len(ids) - 1 for ids in texts),
            "disk_bytes": sum(p.stat().st_size for p in made.glob("*.distcp")),
            "memory_bytes": weight_bytes(loaded.model),
        })  # fmt: skip
    return rows


def stored_bytes(args: ModelArgs, dtype: str, scheme: str | None) -> int:
    """Of a checkpoint's weights."""
    total = 0
    for name in parameter_names(args.n_layers):
        shape = global_shape(name, args)
        form = None if scheme is None else format_of(name, shape, scheme)
        parts = [(shape, getattr(torch, dtype))] if form is None else list(form.parts(shape).values())
        total += sum(math.prod(size) * of.itemsize for size, of in parts)
    return total


def speed(model: str, threads: int, rounds: int, new: int) -> list[dict[str, Any]]:
    """A row a kind: tokens a second, and the ratio to bfloat16 in the same round; medians."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    engines: dict[str, Engine] = {}
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    try:
        for kind, (dtype, scheme, kv) in KINDS.items():
            engines[kind] = Engine(
                model, 1, dtype, device="cpu", quantization=scheme, kv_cache_dtype=kv, kv_cache_bytes=160 << 20
            )
        for _ in range(rounds + 1):
            for kind, engine in engines.items():
                short_s = engine.run(1, _SHORT, _SHORT)
                long_s = engine.run(1, _SHORT, _SHORT + new)
                prefill_s = engine.run(1, _PROMPT, 1)
                runs[kind].append({"generate": new / (long_s - short_s), "prefill": _PROMPT / prefill_s})
    finally:
        for engine in engines.values():
            engine.close()
    args, rows = ModelArgs.from_params(MODELS[model]), []
    for kind, (dtype, scheme, _) in KINDS.items():
        row: dict[str, Any] = {"kind": kind, "stored_bytes": stored_bytes(args, dtype, scheme)}
        for what in ("generate", "prefill"):
            ours, beside = ([run[what] for run in runs[k][1:]] for k in (kind, "bfloat16"))  # the first warms up
            row[what] = statistics.median(ours)
            row[f"{what}_ratio"] = statistics.median(a / b for a, b in zip(ours, beside, strict=True))
        rows.append(row)
    return rows


def main(
    stories: str | None = None,
    text: str | None = None,
    model: str = "110M",
    threads: int = 1,
    rounds: int = 3,
    new: int = 32,
) -> None:
    """Measures, prints the tables and writes `bench/results/quantization-cpu.json`.

    Args:
        stories: a further checkpoint, judged on `text`.
        text: see above.
        model: of the speed, a key of `MODELS`.
        threads: of each engine.
        rounds: that count.
        new: tokens generated in a run.
    """
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="tpserve-bench-") as folder:
        figures["demo"] = quality(DEMO, None, Path(folder) / "demo")
        if stories is not None:
            assert text is not None, "--stories needs --text"
            figures["stories"] = quality(Path(stories), Path(text), Path(folder) / "stories")
    figures["speed"] = {"model": model, "threads": threads, "new": new, "rows": speed(model, threads, rounds, new)}
    write_json(RESULT, f"python -m tpserve.bench.quantization {' '.join(sys.argv[1:])}".strip(), figures)
    show(figures)


def show(figures: dict[str, Any]) -> None:
    """The tables, as docs/checkpoints.md has them."""
    for name in ("demo", "stories"):
        if name in figures:
            header = [
                f"{name}, {figures[name][0]['tokens']} tokens",
                "nats a token",
                "perplexity",
                "MB on disk",
                "MB in memory",
            ]
            rows = [
                [row["kind"], f"{row['nll']:.4f}", f"{row['perplexity']:.3f}", f"{row['disk_bytes'] / 1e6:.2f}",
                 f"{row['memory_bytes'] / 1e6:.2f}"]
                for row in figures[name]
            ]  # fmt: skip
            print(markdown(header, rows), end="\n\n")
    speeds = figures["speed"]
    header = [f"{speeds['model']}, {speeds['threads']} threads", "MB of weights", "generate, tokens/s", "to bfloat16",
              "prefill, tokens/s", "to bfloat16"]  # fmt: skip
    rows = [
        [row["kind"], f"{row['stored_bytes'] / 1e6:.0f}", f"{row['generate']:.1f}", f"{row['generate_ratio']:.2f}",
         f"{row['prefill']:.0f}", f"{row['prefill_ratio']:.2f}"]
        for row in speeds["rows"]
    ]  # fmt: skip
    print(markdown(header, rows))


if __name__ == "__main__":
    fire.Fire(main)

"""Tokens a second of one stream on a CPU, beside llama.cpp: `python -m tpserve.bench.cpu --llama_bench PATH`.

Both get random weights of the same shape and type (llama.cpp's as a GGUF file that the `gguf` package writes), the same
number of threads, and take turns, round by round; medians are compared. Ours is the whole engine (client, sockets,
scheduler, sampler); `llama-bench` is the bare network. Generation is the difference of a long and a short request;
prefill is the time to the first token of a prompt.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fire
import numpy as np

from tpserve.bench.engine_runs import MODELS, Engine
from tpserve.bench.record import write_result
from tpserve.model.args import ModelArgs

_PROMPT, _SHORT = 128, 8


def write_shape(writer: Any, args: ModelArgs) -> None:
    """What a GGUF file says of a network's shape; `writer` is a `gguf.GGUFWriter`."""
    writer.add_context_length(2048)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.ffn_hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_vocab_size(args.vocab_size)


def write_gguf(path: Path, args: ModelArgs, dtype: str) -> None:
    """Random weights as llama.cpp reads them.

    Args:
        path: to write.
        args: the shape.
        dtype: "float32" or "bfloat16", of the matrices; norms are float32.
    """
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    write_shape(writer, args)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"token{i}".encode() for i in range(args.vocab_size)])
    writer.add_token_scores([0.0] * args.vocab_size)
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * args.vocab_size)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(columns**-0.5)
        if dtype == "bfloat16":
            halves = (values.view(np.uint32) >> 16).astype(np.uint16)
            writer.add_tensor(name, halves.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, values)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(args.dim, np.float32))

    queries, keys = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    matrix("token_embd.weight", args.vocab_size, args.dim)
    for i in range(args.n_layers):
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", queries, args.dim)
        matrix(f"blk.{i}.attn_k.weight", keys, args.dim)
        matrix(f"blk.{i}.attn_v.weight", keys, args.dim)
        matrix(f"blk.{i}.attn_output.weight", args.dim, queries)
        matrix(f"blk.{i}.ffn_gate.weight", args.ffn_hidden_dim, args.dim)
        matrix(f"blk.{i}.ffn_up.weight", args.ffn_hidden_dim, args.dim)
        matrix(f"blk.{i}.ffn_down.weight", args.dim, args.ffn_hidden_dim)
    norm("output_norm.weight")
    matrix("output.weight", args.vocab_size, args.dim)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _theirs(llama_bench: str, model: Path, threads: int, new: int) -> dict[str, float]:
    command = [llama_bench, "-m", str(model), "-p", str(_PROMPT), "-n", str(new), "-t", str(threads), "-r", "1",
               "-o", "json"]  # fmt: skip
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = json.loads(out.stdout)
    return {("generate" if row["n_gen"] else "prefill"): row["avg_ts"] for row in rows}


def _ours(engine: Engine, new: int) -> dict[str, float]:
    prefill_s = engine.run(1, _PROMPT, 1)
    short_s = engine.run(1, _SHORT, _SHORT)
    long_s = engine.run(1, _SHORT, _SHORT + new)
    return {"generate": new / (long_s - short_s), "prefill": _PROMPT / prefill_s}


def compare(llama_bench: str, model: str, dtype: str, threads: int, rounds: int, new: int) -> dict[str, Any]:
    """Medians over rounds, tokens a second; and of the ratios of each round."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(file, ModelArgs.from_params(MODELS[model]), dtype)
        engine = Engine(model, 1, dtype, device="cpu")
        try:
            _ours(engine, new)
            pairs = [(_ours(engine, new), _theirs(llama_bench, file, threads, new)) for _ in range(rounds)]
        finally:
            engine.close()
    figures: dict[str, Any] = {"dtype": dtype}
    for kind in ("generate", "prefill"):
        figures[kind] = {
            "ours": statistics.median(ours[kind] for ours, _ in pairs),
            "llama_cpp": statistics.median(theirs[kind] for _, theirs in pairs),
            "ratio": statistics.median(ours[kind] / theirs[kind] for ours, theirs in pairs),
            "ratios": sorted(round(ours[kind] / theirs[kind], 3) for ours, theirs in pairs),
        }
    return figures


def main(
    llama_bench: str,
    model: str = "110M",
    dtypes: Any = "float32,bfloat16",
    threads: int = 2,
    rounds: int = 9,
    new: int = 64,
) -> None:
    """Measures and prints the table.

    Args:
        llama_bench: llama.cpp's benchmark program, built for this machine.
        model: a key of `MODELS`.
        dtypes: of weights, comma-separated.
        threads: of each.
        rounds: pairs of runs.
        new: tokens generated in a run.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    names = dtypes.split(",") if isinstance(dtypes, str) else dtypes  # fire makes a tuple of it
    rows = [compare(llama_bench, model, dtype, threads, rounds, new) for dtype in names]
    print(f"{'':10}{'':10}{'ours':>10}{'llama.cpp':>11}{'ratio':>8}   tokens/s, {model}, {threads} threads")
    for row in rows:
        for kind in ("generate", "prefill"):
            figure = row[kind]
            print(
                f"{row['dtype']:10}{kind:10}{figure['ours']:>10.1f}{figure['llama_cpp']:>11.1f}{figure['ratio']:>8.2f}"
            )
    command = f"python -m tpserve.bench.cpu {' '.join(sys.argv[1:])}"
    write_result(f"cpu_{model}", command, {"model": model, "threads": threads, "new": new, "rows": rows})


if __name__ == "__main__":
    fire.Fire(main)

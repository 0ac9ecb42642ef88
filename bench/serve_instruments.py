"""Whether `tpserve bench serve` measures what others measure: `python -m tpserve.bench.serve_instruments --url URL …`.

Ours and another load generator are pointed at one running server, in turn, the order changing from pair to pair: as
many requests, of the same lengths in text, at the same times, evenly spaced. What is compared are the instruments, so
the rate should be far below what the server can do.

The other one's command writes the JSON of `vllm bench serve`. In it {url}, {port}, {prompts} (a file of JSON lines
with "prompt" and "output_tokens"), {requests}, {rate}, {output_len}, {seed}, {folder} and {file} (where, and under
which name, the JSON is to be) are replaced. Prompts differ from run to run, so that no prefix cache helps the second.

Exit status 1: the median over pairs of tokens/s or of TTFT p50 differs by more than 5%.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fire

from tpserve.bench.record import write_result
from tpserve.bench.serve import ratio_table, ratios
from tpserve.bench.serve_arrivals import Arrival
from tpserve.bench.serve_run import Asking, load_texts, run

LIMIT = 0.05


def theirs(command: str, values: dict[str, Any]) -> dict[str, Any]:
    """Runs the other instrument; its figures under our names."""
    for name, value in values.items():
        command = command.replace(f"{{{name}}}", str(value))
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    path = Path(values["folder"]) / values["file"]
    if done.returncode or not path.is_file():
        raise SystemExit(f"status {done.returncode}, no figures:\n{(done.stdout + done.stderr)[-3000:]}")
    told = json.loads(path.read_text())
    if told["completed"] != values["requests"]:
        raise SystemExit(f"only {told['completed']} of {values['requests']} requests were answered")
    points = {ours: {"p50": told[f"median_{name}_ms"], "p99": told[f"p99_{name}_ms"]}
              for ours, name in (("ttft_ms", "ttft"), ("itl_ms", "itl"), ("e2e_ms", "e2el"))}  # fmt: skip
    return {"output_tokens_per_s": told["output_throughput"], "requests_per_s": told["request_throughput"],
            "output_tokens": told["total_output_tokens"], **points}  # fmt: skip


def main(
    url: str,
    command: str,
    tokenizer: str,
    rate: float = 2.0,
    requests: int = 60,
    input_len: int = 64,
    output_len: int = 32,
    pairs: int = 5,
    name: str = "vllm bench serve",
    api_key: str = "",
) -> None:
    """Measures and prints the table.

    Args:
        url: of a running server.
        command: the other instrument's.
        tokenizer: the model's.
        rate: requests a second.
        requests, input_len, output_len: see above.
        pairs: of runs.
        name: of the other instrument.
        api_key: of the server.
    """
    texts = load_texts(tokenizer)
    asking = Asking(texts=texts, api_key=api_key)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tpserve-bench-") as folder:
        for pair in range(pairs):
            rng = random.Random(pair)
            lines = [{"prompt": texts.make(input_len, rng), "output_tokens": output_len} for _ in range(requests)]
            prompts = Path(folder) / f"prompts-{pair}.jsonl"
            prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
            values = {"url": url, "port": url.rpartition(":")[2], "prompts": prompts, "requests": requests,
                      "rate": rate, "output_len": output_len, "seed": pair, "folder": folder,
                      "file": f"theirs-{pair}.json"}  # fmt: skip
            arrivals = [Arrival((i + 1) / rate, input_len, output_len) for i in range(requests)]
            for who in ("ours", "peer") if pair % 2 == 0 else ("peer", "ours"):
                figures = theirs(command, values) if who == "peer" else run(url, asking, arrivals, {}, f"pair {pair}")
                rows.append({"who": who, "pair": pair, "rate": f"{rate:g}", **figures})
    found = ratios(rows)
    print(ratio_table(found))
    told = f"python -m tpserve.bench.serve_instruments --rate {rate:g} --requests {requests} --input_len {input_len} " \
           f"--output_len {output_len} --pairs {pairs}"  # fmt: skip
    write_result("serve_instruments", told, {"instrument": name, "requests": requests, "rate": rate,
                 "input_len": input_len, "output_len": output_len, "pairs": pairs, "ratios": found})  # fmt: skip
    judged = {one["figure"]: one["ratio"] for one in found if one["figure"] in ("output tokens/s", "TTFT p50")}
    sys.exit(any(abs(ratio - 1) > LIMIT for ratio in judged.values()))


if __name__ == "__main__":
    fire.Fire(main)

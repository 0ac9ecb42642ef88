"""Whether `tpserve bench serve` measures what others measure: `python -m tpserve.bench.serve_instruments --url URL …`.

Ours and another load generator are pointed at one running server: as many requests, of the same lengths in text, at the
same rate, evenly spaced. What is compared are the instruments, so the rate should be far below what the server can do.
They take turns, the order changing from pair to pair; with `--begins` they run at the same time, ours half an interval
after the other's requests: what else happens on the machine then happens to both.

The other one's command writes the JSON of `vllm bench serve`. In it {url}, {port}, {prompts} (a file of JSON lines
with "prompt" and "output_tokens"), {requests}, {rate}, {output_len}, {seed}, {folder} and {file} (where, and under
which name, the JSON is to be) are replaced. Prompts differ from run to run, so that no prefix cache helps the second.

Exit status 1: the median over pairs of tokens/s or of TTFT p50 differs by more than 5%.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fire

from tpserve.bench.record import write_result
from tpserve.bench.serve import ratio_table, ratios
from tpserve.bench.serve_arrivals import Arrival
from tpserve.bench.serve_run import Asking, load_texts, run

LIMIT = 0.05


class Theirs:
    """A run of the other instrument.

    Args:
        command: see above.
        values: what is replaced in it.
    """

    def __init__(self, command: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            command = command.replace(f"{{{name}}}", str(value))
        self._values = values
        self._path = Path(values["folder"]) / values["file"]
        self._said: list[str] = []
        self._process = subprocess.Popen(
            command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip

    def wait_for(self, words: str) -> None:
        """Until it prints them; to the end, where it does not."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.append(line)
            if words and words in line:
                return

    def figures(self) -> dict[str, Any]:
        """Its figures under our names, when it has ended."""
        self.wait_for("")
        if self._process.wait() or not self._path.is_file():
            raise SystemExit(f"status {self._process.returncode}, no figures:\n{''.join(self._said)[-3000:]}")
        told = json.loads(self._path.read_text())
        if told["completed"] != self._values["requests"]:
            raise SystemExit(f"only {told['completed']} of {self._values['requests']} requests were answered")
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
    begins: str = "",
    label: str = "",
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
        begins: what it prints when its first request is an interval away; then both run at the same time.
        label: of the server, at the end of the result's name.
        api_key: of the server.
    """
    texts = load_texts(tokenizer)
    asking = Asking(texts=texts, api_key=api_key)
    rows: list[dict[str, Any]] = []
    running: list[Theirs] = []
    late_ms: list[float] = []
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
            for who in ("ours", "peer") if begins or pair % 2 == 0 else ("peer", "ours"):
                if begins and who == "ours":

                    def begin(values: dict[str, Any] = values) -> None:
                        running.append(Theirs(command, values))
                        running[-1].wait_for(begins)
                        time.sleep(0.5 / rate)

                    figures = run(url, asking, arrivals, {}, f"pair {pair}", begin)
                elif who == "ours":
                    figures = run(url, asking, arrivals, {}, f"pair {pair}")
                else:
                    figures = (running[-1] if begins else Theirs(command, values)).figures()
                if who == "ours":  # the other one counts from the sending, however late that was
                    figures["ttft_ms"] = figures["ttft_sent_ms"]
                    late_ms.append(figures["late_ms"]["p50"])
                rows.append({"who": who, "pair": pair, "rate": f"{rate:g}", **figures})
    found = ratios(rows)
    print(ratio_table(found))
    flags = f"--rate {rate:g} --requests {requests} --input_len {input_len} --output_len {output_len} --pairs {pairs}"
    how = {"instrument": name, "together": bool(begins), "requests": requests, "rate": rate, "input_len": input_len,
           "output_len": output_len, "pairs": pairs}  # fmt: skip
    write_result(
        f"serve_instruments-{label}" if label else "serve_instruments",
        f"python -m tpserve.bench.serve_instruments {flags}",
        {**how, "late_p50_ms": late_ms, "ratios": found},
    )
    judged = {one["figure"]: one["ratio"] for one in found if one["figure"] in ("output tokens/s", "TTFT p50")}
    sys.exit(any(abs(ratio - 1) > LIMIT for ratio in judged.values()))


if __name__ == "__main__":
    fire.Fire(main)

"""GuideLLM: ten seconds of chats, four at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.clients.steps import KEY, MODEL, URL, Steps

_TOKENS = 40


def main() -> None:
    steps = Steps("guidellm")
    for path in ("/v1/chat/completions", "/v1/completions"):
        with steps.step(f"{path}, concurrent 4") as step, tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prompts = [{"prompt": f"Tell me a story about king number {i}."} for i in range(1000)]
            (folder / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts))
            backend = {
                "kind": "openai_http", "target": URL, "model": MODEL, "api_key": KEY, "max_tokens": _TOKENS,
            }  # fmt: skip
            command = [
                Path(sys.executable).parent / "guidellm", "run",
                "--backend", ",".join(f"{name}={value}" for name, value in backend.items()),
                "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_duration,seconds=10",
                "--data", f"kind=json_file,path={folder / 'prompts.jsonl'}",
                "--output", f"kind=json,path={folder / 'out.json'}", "--disable-console",
            ]  # fmt: skip
            ran = subprocess.run(
                command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
            )
            assert ran.returncode == 0, (ran.stdout + ran.stderr)[-400:]
            (told,) = json.loads((folder / "out.json").read_text())["benchmarks"]
            metrics = told["metrics"]
            totals = metrics["request_totals"]
            assert totals["errored"] == 0, totals
            assert totals["successful"] >= 8, totals
            first = metrics["time_to_first_token_ms"]["successful"]["median"]
            speed = metrics["output_tokens_per_second"]["successful"]["mean"]
            step.found(f"{totals['successful']} requests, TTFT {first:.0f} ms, {speed:.0f} tokens/s")
    steps.end()


main()

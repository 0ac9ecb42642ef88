"""EleutherAI's harness: multiple choice by echo and logprobs, and a generation.

It counts a context's tokens itself, so that it needs the tokenizer: a folder with the model's own file will do.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from tests.clients.steps import KEY, MODEL, URL, Steps

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parents[1] / "model_store" / "demo" / "tokenizer.model"


def main() -> None:
    os.environ["OPENAI_API_KEY"] = KEY
    steps = Steps("lm_eval")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_HOME"] = name
        task = yaml.safe_load((HERE / "demo_task.yaml").read_text())
        task["dataset_kwargs"]["data_files"]["test"] = str(HERE / "demo_task.jsonl")
        (folder / "tasks").mkdir()
        (folder / "tasks" / "demo_task.yaml").write_text(yaml.safe_dump(task))
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir()
        shutil.copy(TOKENIZER, tokenizer)
        told = {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "legacy": True,
            "add_bos_token": True,
        }
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(told))
        (tokenizer / "config.json").write_text(json.dumps({"model_type": "llama"}))
        manager = TaskManager(include_path=str(folder / "tasks"))
        scores: dict[str, list[list[float]]] = {}
        for form, ids in (("token ids", True), ("text", False)):
            with steps.step(f"local-completions, multiple choice by {form}") as step:
                results = simple_evaluate(
                    model="local-completions",
                    model_args={
                        "model": MODEL, "base_url": f"{URL}/v1/completions", "tokenizer": str(tokenizer),
                        "tokenizer_backend": "huggingface", "tokenized_requests": ids, "add_bos_token": ids,
                        "num_concurrent": 2, "max_retries": 1, "max_length": 512,
                    },
                    tasks=["tpserve_demo"],
                    task_manager=manager,
                    bootstrap_iters=0,
                )  # fmt: skip
                accuracy = results["results"]["tpserve_demo"]["acc,none"]
                step.found(f"accuracy {accuracy:.1f} of 10 documents")
                assert accuracy > 0.6, "no better than chance"
                scores[form] = [
                    [float(value) for ((value, _),) in one["resps"]] for one in results["samples"]["tpserve_demo"]
                ]
        with steps.step("the same differences between choices by both"):
            # Text gets its BOS from the server, and the harness does not count that one: the context's last token is
            # part of each choice's score. Ids are taken as they are.
            one, other = ([value - row[0] for row in rows for value in row] for rows in scores.values())
            assert len(one) == len(other) == 30
            assert all(math.isclose(a, b, abs_tol=2e-3) for a, b in zip(one, other, strict=True)), (one, other)
    steps.end()


main()

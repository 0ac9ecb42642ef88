"""LangChain: a streamed chat, and a batch that shares the engine.

pip install langchain-openai; python examples/langchain_example.py [URL]
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request

from langchain_openai import ChatOpenAI
from pydantic import SecretStr

URL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TPSERVE_URL", "http://127.0.0.1:8080")
KEY = os.environ.get("TPSERVE_API_KEY", "none")


def main() -> None:
    request = urllib.request.Request(f"{URL}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as response:
        name = json.load(response)["data"][0]["id"]
    model = ChatOpenAI(
        model=name, base_url=f"{URL}/v1", api_key=SecretStr(KEY), max_completion_tokens=32, stream_usage=True
    )
    num_tokens = 0
    for chunk in model.stream("Tell me a story."):
        print(chunk.content, end="", flush=True)
        num_tokens += (chunk.usage_metadata or {}).get("output_tokens", 0)
    print(f"\nstream: {num_tokens} tokens")
    answers = model.batch(["Tell me of a cat.", "Tell me of a dog."])
    print(f"batch: {len(answers)} answers")


if __name__ == "__main__":
    main()

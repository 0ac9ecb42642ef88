"""Triton's own client: infer with tensors; and its generate extension, which is plain JSON and streams.

pip install 'tritonclient[http]' numpy; python examples/triton_client.py [URL]
"""

from __future__ import annotations

import json
import os
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

URL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TPSERVE_URL", "http://127.0.0.1:8080")
HEADERS = {"Authorization": f"Bearer {os.environ.get('TPSERVE_API_KEY', '')}"}
MODEL = "ensemble"  # what TensorRT-LLM's example calls it


def tensor(name: str, datatype: str, rows: list[list[Any]], dtype: Any) -> InferInput:
    made = InferInput(name, [len(rows), len(rows[0])], datatype)
    made.set_data_from_numpy(np.array(rows, dtype=dtype))
    return made


def infer() -> None:
    address = urllib.parse.urlsplit(URL)
    client = InferenceServerClient(address.netloc, ssl=address.scheme == "https")
    prompts = [[b"Once upon a time"], [b"There was a wolf"]]
    inputs = [tensor("text_input", "BYTES", prompts, object), tensor("max_tokens", "INT32", [[16], [8]], np.int32)]
    outputs = [InferRequestedOutput("text_output"), InferRequestedOutput("sequence_length")]
    result = client.infer(MODEL, inputs, outputs=outputs, headers=HEADERS)
    texts, lengths = result.as_numpy("text_output"), result.as_numpy("sequence_length")
    assert texts is not None
    assert lengths is not None
    for text, length in zip(texts.flat, lengths.flat, strict=True):
        print(f"infer: {length} tokens: {text.decode()!r}")
    client.close()


def generate(path: str, **fields: Any) -> Iterator[dict[str, Any]]:
    body = json.dumps({"text_input": "Once upon a time", "max_tokens": 16, **fields}).encode()
    request = urllib.request.Request(f"{URL}/v2/models/{MODEL}/{path}", body, HEADERS)
    with urllib.request.urlopen(request) as response:
        for line in response:
            if line.strip():
                yield json.loads(line.removeprefix(b"data: "))


def main() -> None:
    infer()
    (whole,) = generate("generate", temperature=0.0)
    print(f"generate: {whole['text_output']!r}")
    texts = [event["text_output"] for event in generate("generate_stream", temperature=0.0, stream=True)]
    print(f"generate_stream: {len(texts)} events; the same text: {''.join(texts) == whole['text_output']}")


if __name__ == "__main__":
    main()

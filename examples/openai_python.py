"""OpenAI's own client: a streamed chat, an answer after a JSON schema, a tool.

pip install openai; python examples/openai_python.py [URL]
"""

from __future__ import annotations

import json
import os
import sys
from typing import cast

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

URL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TPSERVE_URL", "http://127.0.0.1:8080")
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather in a city.", "parameters": CITY},
}


def stream(client: OpenAI, model: str) -> None:
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me a story."}],
        max_completion_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chunks:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage is not None:
            print(f"\nstream: {chunk.usage.completion_tokens} tokens")


def schema(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_completion_tokens=256,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}},
    ).choices[0]
    # An answer that its length cut off is no JSON yet.
    print("schema:", json.loads(answer.message.content or "") if answer.finish_reason == "stop" else "cut off")


def tools(client: OpenAI, model: str) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Is it raining in Rome?"}]
    answer = client.chat.completions.create(
        model=model, messages=messages, max_completion_tokens=256, tools=[WEATHER], tool_choice="required"
    ).choices[0]
    calls = [call for call in answer.message.tool_calls or [] if call.type == "function"]
    if not calls or answer.finish_reason == "length":
        print("tools: cut off")
        return
    messages.append(cast(ChatCompletionMessageParam, answer.message.model_dump(exclude_none=True)))
    for call in calls:
        print(f"tools: {call.function.name}({json.loads(call.function.arguments)})")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    told = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=32)
    print("told:", told.choices[0].message.content)


def main() -> None:
    client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("TPSERVE_API_KEY", "none"))
    model = client.models.list().data[0].id
    stream(client, model)
    schema(client, model)
    tools(client, model)


if __name__ == "__main__":
    main()

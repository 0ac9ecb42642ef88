"""LiteLLM."""

from __future__ import annotations

import json
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks GitHub for prices

import litellm

from tests.clients.steps import KEY, MODEL, URL, Steps

SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "green"]}},
    "required": ["color"],
    "additionalProperties": False,
}


def main() -> None:
    steps = Steps("litellm")
    messages = [{"role": "user", "content": "Tell me a story about a king."}]
    for provider in ("openai", "hosted_vllm"):
        asked: dict[str, Any] = {
            "model": f"{provider}/{MODEL}", "messages": messages, "api_base": f"{URL}/v1", "api_key": KEY,
            "max_tokens": 60, "temperature": 0, "num_retries": 0, "timeout": 60,
        }  # fmt: skip
        roomy = {**asked, "max_tokens": 220}  # JSON takes a vocabulary of fairy tales many tokens
        with steps.step(f"{provider}: completion"):
            whole = litellm.completion(**asked)
            assert whole.usage.completion_tokens == 60
        with steps.step(f"{provider}: stream"):
            parts = [part.choices[0].delta.content or "" for part in litellm.completion(**asked, stream=True)]
            assert len(parts) > 5
            assert "".join(parts) == whole.choices[0].message.content
        with steps.step(f"{provider}: json_schema"):
            form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
            answer = litellm.completion(**roomy, response_format=form).choices[0].message.content
            assert json.loads(answer)["color"] in ("red", "green")
        with steps.step(f"{provider}: tool call"):
            tools = [{"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}]
            message = litellm.completion(**roomy, tools=tools, tool_choice="required").choices[0].message
            assert message.tool_calls[0].function.name == "paint"
    with steps.step("text_completion"):
        text = litellm.text_completion(
            model=f"text-completion-openai/{MODEL}",
            prompt="Once upon a time",
            api_base=f"{URL}/v1",
            api_key=KEY,
            max_tokens=10,
        )
        assert text.choices[0].text
    with steps.step("an error by its class"):
        try:
            litellm.completion(**{**asked, "top_p": 2})
        except litellm.BadRequestError as e:
            assert "top_p" in str(e)  # noqa: PT017
        else:
            raise AssertionError("top_p 2 was taken")
    steps.end()


main()

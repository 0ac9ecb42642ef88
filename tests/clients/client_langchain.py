"""LangChain."""

from __future__ import annotations

from typing import Literal

import pydantic
from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

from tests.clients.steps import KEY, MODEL, URL, Steps


class Paint(pydantic.BaseModel):
    """What to paint with."""

    color: Literal["red", "green"]
    n: int = pydantic.Field(ge=0, le=9)


@tool
def paint(color: Literal["red", "green"]) -> str:
    """Paints."""
    return f"painted {color}"


def main() -> None:
    steps = Steps("langchain-openai")
    settings = {"base_url": f"{URL}/v1", "api_key": KEY, "model": MODEL, "max_retries": 0, "timeout": 60}
    chat = ChatOpenAI(**settings, max_tokens=60, temperature=0)
    # JSON takes a vocabulary of fairy tales many tokens.
    roomy = ChatOpenAI(**settings, max_tokens=220, temperature=0)
    question = "Tell me a story about a king."
    with steps.step("invoke") as step:
        whole = chat.invoke(question)
        assert whole.usage_metadata is not None
        assert whole.usage_metadata["output_tokens"] == 60
        step.found(f"{whole.usage_metadata['total_tokens']} tokens")
    with steps.step("stream"):
        parts = [part.text for part in chat.stream(question)]
        assert len(parts) > 5
        assert "".join(parts) == whole.text
    with steps.step("batch of 4"):
        assert [one.text for one in chat.batch([question] * 4)] == [whole.text] * 4
    for method in ("json_schema", "function_calling"):
        with steps.step(f"with_structured_output {method}"):
            assert isinstance(roomy.with_structured_output(Paint, method=method).invoke(question), Paint)
    with steps.step("bind_tools, and the tool's result"):
        armed = roomy.bind_tools([paint], tool_choice="any")
        called = armed.invoke(question)
        (call,) = called.tool_calls
        result = paint.invoke(call)
        assert isinstance(result, ToolMessage)
        answer = chat.bind_tools([paint], tool_choice="none").invoke([("user", question), called, result])
        assert answer.text
    with steps.step("logprobs"):
        scored = chat.bind(logprobs=True, top_logprobs=2).invoke(question)
        assert len(scored.response_metadata["logprobs"]["content"]) == 60
    with steps.step("completions"):
        assert OpenAI(**settings, max_tokens=10).invoke("Once upon a time")
    steps.end()


main()

"""Tools: how the model is told of them, what a forced call must look like, and which answers are calls.

Llama-2 was trained on no form of its own, so that tools stand as plain text in the system prompt and a call is the JSON
object that Llama 3.1 writes: `{"name": …, "parameters": {…}}`. A call that must come is guided by the tools' schemas;
with "auto" the model is free, and an answer that is exactly one call, or a list of calls, is taken as such.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping
from typing import Any

from tpserve.engine import fields
from tpserve.engine.errors import RequestError
from tpserve.handler.openai.chat_schema import ChatRequest, Function, NamedTool

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
# Beside these, other arguments than the named ones may be meant.
_OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf")
_INTRODUCTION = "You have access to these functions:"
_ONE = 'To call one, answer with nothing but {"name": function name, "parameters": object of its arguments}.'
_MANY = " To call several, answer with nothing but a JSON list of such objects."


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that an answer is.

    Attributes:
        arguments: JSON.
    """

    name: str
    arguments: str

    @property
    def complete(self) -> bool:
        """Nothing cut the arguments off."""
        try:
            json.loads(self.arguments)
        except (ValueError, RecursionError):
            return False
        return True

    def as_json(self) -> dict[str, Any]:
        """In OpenAI's form, with a new id."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


@dataclasses.dataclass(frozen=True)
class Tools:
    """The functions of a request that may be called.

    Attributes:
        functions: empty: none.
        named: the one that must be called.
        required: one of them must be called.
        many: an answer may be several calls.
    """

    functions: tuple[Function, ...] = ()
    named: str | None = None
    required: bool = False
    many: bool = True

    @classmethod
    def of(cls, asked: ChatRequest) -> Tools:
        """The tools of a request.

        Raises:
            RequestError: they do not go together.
        """
        functions = tuple(tool.function for tool in asked.tools or ())
        names = [function.name for function in functions]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise RequestError(f"tools[{i}].function.name {name!r} is there twice", field="tools")
        choice = asked.tool_choice
        if choice is None or choice == "auto":
            return cls(functions, many=asked.parallel_tool_calls is not False)
        if choice == "none":
            return cls()
        if not functions:
            raise RequestError("tool_choice needs tools", field="tool_choice")
        if not isinstance(choice, NamedTool):
            return cls(functions, required=True)
        if choice.function.name not in names:
            said = f"tool_choice names {fields.shown(choice.function.name)}, which is not among the tools"
            raise RequestError(said, field="tool_choice")
        return cls(functions, named=choice.function.name)

    @property
    def forced(self) -> bool:
        """The answer is a call, whatever the model thinks."""
        return self.required or self.named is not None

    def prompt(self) -> str | None:
        """What the system prompt says of them.

        Raises:
            RequestError: it would be no text.
        """
        if not self.functions:
            return None
        told = [_json(_told(function)) for function in self.functions]
        return "\n".join([_INTRODUCTION, *told, _ONE + _MANY * (self.many and not self.forced)])

    def schema(self, answer: Mapping[str, Any] | None) -> str | None:
        """The JSON schema of the answer, if it has one.

        Args:
            answer: the schema of an answer that is no call; None: any text.
        """
        if self.named is not None:
            (function,) = (function for function in self.functions if function.name == self.named)
            return _json(_parameters(function))
        if self.required or (self.functions and answer is not None):
            branches = {f"tool{i}": _parameters(function) for i, function in enumerate(self.functions)}
            calls: list[Any] = [
                {
                    "type": "object",
                    "properties": {"name": {"const": function.name}, "parameters": {"$ref": f"#/$defs/{branch}"}},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                }
                for branch, function in zip(branches, self.functions, strict=True)
            ]
            if not self.required:
                branches["answer"] = dict(answer or {})
                calls.append({"$ref": "#/$defs/answer"})
            try:
                moved = {branch: _moved(schema, f"#/$defs/{branch}") for branch, schema in branches.items()}
            except RecursionError:
                raise RequestError("tools are nested too deeply", field="tools") from None
            return _json({"anyOf": calls, "$defs": moved})
        return None if answer is None else _json(answer)

    def calls(self, text: str) -> list[Call]:
        """The calls that a whole answer is; none: it is text."""
        if not self.functions:
            return []
        if self.named is not None:
            return [Call(self.named, text)]
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        found = [self._call(one) for one in (value if isinstance(value, list) and self.many else [value])]
        calls = [call for call in found if call is not None]
        return calls if len(calls) == len(found) else []

    def _call(self, value: Any) -> Call | None:
        if not isinstance(value, dict) or len(value) != 2:
            return None
        name, arguments = value.get("name"), value.get("parameters", value.get("arguments"))
        if not isinstance(arguments, dict) or all(function.name != name for function in self.functions):
            return None
        try:
            # In ASCII: escapes may spell what UTF-8 cannot.
            return Call(str(name), json.dumps(arguments, allow_nan=False))
        except (ValueError, RecursionError):
            return None


def _told(function: Function) -> dict[str, Any]:
    told = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {key: value for key, value in told.items() if value is not None}


def _parameters(function: Function) -> Mapping[str, Any]:
    """Clients seldom close the object; models would invent arguments, on which functions fail."""
    schema = function.parameters
    if schema is None:
        return _NO_PARAMETERS
    names = isinstance(schema.get("properties"), dict) and not any(key in schema for key in _OPEN)
    return {**schema, "additionalProperties": False} if names else schema


def _moved(schema: Any, root: str) -> Any:
    """A schema that stands at `root` of another: its references into itself lead there."""
    if isinstance(schema, Mapping):
        return {
            key: root + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, root)
            for key, value in schema.items()
        }
    return [_moved(one, root) for one in schema] if isinstance(schema, list) else schema


def _json(value: Any) -> str:
    return fields.json_text("tools", value)

"""Random schemas and regexes, and a small validator of its own for such schemas."""

from __future__ import annotations

import random
import re
from typing import Any


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose values are small."""
    leaves = ["string", "integer", "number", "boolean", "null", "const", "enum"]
    kind = rng.choice(leaves if depth >= 3 else [*leaves, "object", "object", "array", "anyOf"])
    if kind == "object":
        names = rng.sample(["a", "name", "é", "x y", 'q"', "日本"], rng.randint(0, 4))
        properties = {name: random_schema(rng, depth + 1) for name in names}
        required = [name for name in names if rng.random() < 0.5]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        least = rng.randint(0, 2)
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randint(0, 2)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    if kind == "string":
        least = rng.randint(0, 2)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 6)}
    if kind == "const":
        return {"const": _random_value(rng)}
    if kind == "enum":
        return {"enum": [_random_value(rng) for _ in range(rng.randint(1, 4))]}
    if kind in ("integer", "number"):
        low = rng.randint(-1000, 1000)
        bounds = {"minimum": low, "maximum": low + rng.randint(0, 300)}
        return {"type": kind} | {key: value for key, value in bounds.items() if rng.random() < 0.7}
    return {"type": kind}


def _random_value(rng: random.Random) -> Any:
    values = [None, True, False, 0, -7, 1.5, "", "a b", 'q"\\/\n', "日本語🦙", [1, ["x"]], {"k": {"é": None}}]
    return rng.choice(values)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is one of a schema's, for what `random_schema` writes."""
    if "anyOf" in schema:
        return any(fits(value, option) for option in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return any(_same(value, allowed) for allowed in schema.get("enum", [schema.get("const")]))
    kind = schema["type"]
    if kind == "object":
        properties = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(properties)
            and all(fits(child, properties[name]) for name, child in value.items())
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(fits(item, schema["items"]) for item in value)
        )
    if kind == "string":
        return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
    if kind in ("integer", "number"):
        number = isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
        return number and schema.get("minimum", value) <= value <= schema.get("maximum", value)
    return value is None if kind == "null" else isinstance(value, bool)


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def random_regex(rng: random.Random, depth: int = 0) -> tuple[str, str]:
    """A regex in the syntax that Python and the library share, and a text that matches it."""
    if depth >= 3 or rng.random() < 0.35:
        return _random_atom(rng)
    kind = rng.choice(["sequence", "sequence", "either", "repeat"])
    if kind == "repeat":
        low = rng.randint(0, 2)
        high = low + rng.randint(0, 2)
        mark = rng.choice(["?", "*", "+", f"{{{low},{high}}}"])
        times = {"?": (0, 1), "*": (0, 2), "+": (1, 3)}.get(mark, (low, high))
        part, sample = _random_atom(rng)  # nested repeats would take Python's matcher for ever
        return f"(?:{part}){mark}", sample * rng.randint(*times)
    parts = [random_regex(rng, depth + 1) for _ in range(rng.randint(2, 3))]
    if kind == "either":
        return "(" + "|".join(part for part, _ in parts) + ")", rng.choice(parts)[1]
    return "".join(part for part, _ in parts), "".join(sample for _, sample in parts)


def _random_atom(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        text = "".join(rng.choices('ab the{}"\\/.*|\n-é日🦙#', k=rng.randint(1, 3)))
        return re.escape(text), text
    return rng.choice(
        [
            ("[a-c]", "b"),
            ("[^a-c]", " "),
            (r"\d", "7"),
            (".", "é"),
            (r"\s", "\n"),
            ("[é日x]", "日"),
            ("(?:ab|c|é d)", "é d"),
        ]
    )

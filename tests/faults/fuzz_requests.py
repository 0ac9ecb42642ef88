"""Requests that nobody should send: by the OpenAPI document, by changing good ones, and bytes that are no HTTP."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

MESSAGES = [{"role": "user", "content": "once upon a time"}]
TENSOR = {"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": ["once upon a time"]}
# What is right of each path; a few tokens each.
GOOD: dict[str, dict[str, Any]] = {
    "v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "v1/completions": {"prompt": "once upon a time", "max_tokens": 4},
    "tokenize": {"prompt": "once upon a time"},
    "detokenize": {"tokens": [5, 6, 7]},
    "v2/models/ensemble/generate": {"text_input": "once upon a time", "max_tokens": 4},
    "v2/models/ensemble/generate_stream": {"text_input": "once upon a time", "max_tokens": 4},
    "v2/models/ensemble/infer": {"inputs": [TENSOR], "parameters": {"max_tokens": 4}},
    "": {"prompt": "once upon a time", "max_new_tokens": 4},
}
LOOKING = ("health", "health/live", "health/ready", "status", "metrics", "version", "v1/models", "v1/models/x", "v2",
           "v2/health/live", "v2/health/ready", "v2/models/x", "openapi.json", "trace/0", "nowhere")  # fmt: skip
FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "n", "best_of", "beam_width", "seed", "stop", "stop_token_ids",
    "logit_bias", "bad_words", "presence_penalty", "repetition_penalty", "logprobs", "prompt_logprobs", "echo",
    "min_tokens", "ignore_eos", "guided_json", "guided_regex", "guided_choice", "response_format", "tools",
    "tool_choice", "stream", "stream_options", "user", "priority", "timeout_s", "messages", "prompt", "dialog", "mode",
    "text_input", "input_ids", "inputs", "outputs", "parameters", "embedding_bias", "stop_words_list", "end_id",
    "prompt_token_ids", "model", "top_logprobs", "length_penalty", "early_stopping", "cum_log_probs", "nothing",
)  # fmt: skip
SCHEMAS: tuple[Any, ...] = (
    {"type": "object"}, {"enum": ["a", "b"]}, {"type": 5}, {"$ref": "#"}, {"$ref": "#/nowhere"}, True,
    {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(1, 16)]},
    {"type": "string", "minLength": 10**9}, {"type": "array", "minItems": 10**6, "items": {"$ref": "#"}},
    {"type": "number", "multipleOf": 1e-9}, {"oneOf": [{"const": i} for i in range(500)]},
)  # fmt: skip
REGEXES = ("[a-z]+", "(", "(a|b)*a(a|b){200}", "((a{1,100}){1,100}){1,100}", "(.*a.{30}|.*b.{29}){9}", "a" * 9000, "")


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        kind: how it was made.
        raw: from the request line on; it may be no HTTP at all.
    """

    kind: str
    raw: bytes


class Fuzzer:
    """Makes requests; the same seed makes the same ones.

    Args:
        seed: of the first.
        prefix: before each path, without a slash at its end.
        predictions: the path of our own protocol.
        headers: of each request, such as a key.
        schemas: the document's components, for requests that follow it.
    """

    def __init__(
        self,
        seed: int,
        prefix: str = "",
        predictions: str = "",
        headers: Mapping[str, str] | None = None,
        schemas: Mapping[str, Any] | None = None,
    ) -> None:
        self._random = random.Random(seed)
        self._prefix, self._predictions = prefix, predictions
        self._headers, self._schemas = dict(headers or {}), schemas or {}

    def request(self) -> Asked:
        """The next one."""
        makers: list[tuple[int, Callable[[], Asked]]] = [
            (5, self._changed), (3, self._by_document), (2, self._bytes_of_a_body), (1, self._looking),
            (1, self._odd_head), (2, self._no_http),
        ]  # fmt: skip
        (maker,) = self._random.choices([m for _, m in makers], [w for w, _ in makers])
        return maker()

    def body(self) -> tuple[str, Any]:
        """A path and a JSON value that is nearly right for it."""
        path = self._random.choice(list(GOOD))
        body: dict[str, Any] = json.loads(json.dumps(GOOD[path]))
        for _ in range(self._random.choice((0, 1, 1, 2, 3))):
            if self._random.random() < 0.2 and body:
                del body[self._random.choice(list(body))]
            else:
                body[self._random.choice(FIELDS)] = self.value()
        return path, body

    def value(self, depth: int = 0) -> Any:
        """Any JSON value, with a liking for what is at an edge."""
        r = self._random
        match r.randrange(14 if depth < 3 else 9):
            case 0:
                return r.choice((None, True, False))
            case 1:
                return r.choice((0, 1, -1, 2, 3, 128, 129, 2**31 - 1, 2**31, 2**63, 2**64, -(2**63), 10**40))
            case 2:
                return r.choice((0.0, 0.5, 1.0, -0.5, 1e-9, 1e308, 2.5, 1e9))
            case 3:
                return r.choice(("", "a", "true", "5", "auto", "required", "</s>", "[INST]", "東京", "\ud800", "\0"))
            case 4:
                return r.choice(SCHEMAS)
            case 5:
                return r.choice(REGEXES)
            case 6:
                return "once upon a time " * r.choice((1, 100, 10_000))
            case 7:
                return [r.choice((5, -1, 10**9, "a", None))] * r.choice((0, 1, 17, 65, 300, 2000))
            case 8:
                return {str(r.choice((5, -1, "a", 10**12, 7))): r.choice((1, -100, "x", 1e30)) for _ in range(3)}
            case 9:
                return [self.value(depth + 1) for _ in range(r.randrange(4))]
            case 10:
                return {r.choice(FIELDS): self.value(depth + 1) for _ in range(r.randrange(4))}
            case 11:
                return [{"role": r.choice(("user", "system", "wizard", "tool")), "content": self.value(depth + 1)}]
            case 12:
                function = {"name": r.choice(("f", "", "a b")), "parameters": self.value(depth + 1)}
                return [{"type": "function", "function": function}]
            case _:
                return {"type": "json_schema", "json_schema": {"name": "x", "schema": r.choice(SCHEMAS)}}

    def _changed(self) -> Asked:
        path, body = self.body()
        return Asked("changed", self._post(path, json.dumps(body).encode()))

    def _by_document(self) -> Asked:
        names = {"v1/chat/completions": "ChatRequest", "v1/completions": "CompletionRequest",
                 "tokenize": "TokenizeRequest", "detokenize": "DetokenizeRequest"}  # fmt: skip
        path, name = self._random.choice(list(names.items()))
        body = self._of_schema(self._schemas.get(name, {}), 0)
        if isinstance(body, dict):
            body = {**body, "model": None} | ({"max_tokens": 4} if path.startswith("v1/") else {})
        return Asked("by document", self._post(path, json.dumps(body).encode()))

    def _of_schema(self, schema: Any, depth: int) -> Any:
        """A value that a JSON schema describes, more or less."""
        r = self._random
        if "$ref" in schema:
            return self._of_schema(self._schemas[schema["$ref"].rpartition("/")[2]], depth)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self._of_schema(r.choice(schema[key]), depth)
        if "const" in schema or "enum" in schema:
            return schema.get("const", r.choice(schema.get("enum", [None])))
        match schema.get("type"):
            case "object" if "properties" in schema:
                wanted = schema.get("required", [])
                some = [k for k in schema["properties"] if k in wanted or r.random() < 0.12]
                return {key: self._of_schema(schema["properties"][key], depth + 1) for key in some}
            case "array":
                low = schema.get("minItems", 0)
                count = low + (0 if depth > 4 else r.randrange(3))
                return [self._of_schema(schema.get("items", {}), depth + 1) for _ in range(count)]
            case "integer":
                low, high = schema.get("minimum", 0), schema.get("maximum", 20)
                return r.choice((low, high, min(high, low + 1)))
            case "number":
                return r.choice((schema.get("minimum", 0.5), schema.get("maximum", 0.5), 0.5))
            case "string":
                return r.choice(("a", "once upon", "f"))
            case "boolean":
                return r.random() < 0.5
            case "null":
                return None
        return self.value(depth)

    def _bytes_of_a_body(self) -> Asked:
        path, body = self.body()
        raw = bytearray(json.dumps(body).encode())
        for _ in range(self._random.randrange(1, 6)):
            at = self._random.randrange(len(raw) + 1)
            match self._random.randrange(4):
                case 0:
                    raw[at:at] = self._random.randbytes(self._random.randrange(1, 9))
                case 1:
                    del raw[at : at + self._random.randrange(1, 9)]
                case 2:
                    raw[at:at] = self._random.choice((b"[", b"{", b'"', b"\\u", b"NaN", b"1e999", b"[" * 500))
                case 3:
                    raw = raw[:at]
        return Asked("bytes of a body", self._post(path, bytes(raw)))

    def _looking(self) -> Asked:
        method = self._random.choice(("GET", "GET", "GET", "HEAD", "POST", "DELETE", "OPTIONS", "PATCH"))
        return Asked("looking", self._head(method, self._random.choice(LOOKING), {"Content-Length": "0"}))

    def _odd_head(self) -> Asked:
        r = self._random
        path, body = self.body()
        raw = json.dumps(body).encode()
        extra = r.choice(
            (
                {f"X-{i}": "a" for i in range(r.choice((50, 90, 150)))},
                {"X-A": "a" * r.choice((100, 5000, 20_000))},
                {"Content-Encoding": r.choice(("gzip", "br", "identity"))},
                {"Content-Type": r.choice(("text/plain", "application/xml", "", "application/json; charset=utf-16"))},
                {"Transfer-Encoding": "chunked"},
                {"Inference-Header-Content-Length": r.choice(("5", "-1", "99999999", "x"))},
                {"Content-Length": str(r.choice((-1, 0, 10**12, len(raw) // 2)))},
                {"Expect": "100-continue"},
                {"Authorization": "Bearer \xe9"},
            )
        )
        longer = "?" + "a" * r.choice((0, 10, 3000, 9000))
        head = self._head("POST", path, {"Content-Length": str(len(raw)), **extra}, longer)
        return Asked("odd head", head + raw)

    def _no_http(self) -> Asked:
        r = self._random
        good = bytearray(self._post("v1/completions", json.dumps(GOOD["v1/completions"]).encode()))
        match r.randrange(5):
            case 0:
                return Asked("no HTTP", r.randbytes(r.choice((1, 50, 3000))) + b"\r\n\r\n")
            case 1:
                for _ in range(r.randrange(1, 5)):
                    good[r.randrange(60)] = r.randrange(256)
                return Asked("no HTTP", bytes(good))
            case 2:
                return Asked("no HTTP", bytes(good[: r.randrange(len(good))]))
            case 3:
                return Asked("no HTTP", bytes(good).replace(b"\r\n", r.choice((b"\n", b"\r", b"\r\n\r\n", b"\0"))))
            case _:
                chunks = r.choice((b"zz\r\n{}\r\n", b"5\r\n{}\r\n0\r\n\r\n", b"-1\r\n", b"fffffffffffffff\r\n{"))
                head = self._head("POST", "v1/completions", {"Transfer-Encoding": "chunked"})
                return Asked("no HTTP", head + chunks)

    def _post(self, path: str, body: bytes) -> bytes:
        about = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        return self._head("POST", path, about) + body

    def _head(self, method: str, path: str, headers: Mapping[str, str], query: str = "") -> bytes:
        url = f"{self._prefix}/{path or self._predictions}{query}"
        all_of_them = {"Host": "x", "Connection": "close", **self._headers, **headers}
        lines = [f"{method} {url} HTTP/1.1", *(f"{name}: {value}" for name, value in all_of_them.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")

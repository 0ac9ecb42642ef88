"""Spans as OpenTelemetry's own SDK collects them, over an engine that says what a test tells it to."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.handler.fakes import FakeEngine, backend, settled
from tpserve.engine.errors import RequestError
from tpserve.handler.backend import Backend
from tpserve.handler.http import HttpRequest
from tpserve.handler.open_request import Pending
from tpserve.handler.replies import Reply
from tpserve.handler.tracing import NAME, RequestTracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "the wolf"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(engine: FakeEngine, exporter: InMemorySpanExporter) -> Iterator[Backend]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traced = backend(engine)
    traced.tracer = RequestTracer(provider)
    yield traced
    provider.shutdown()


def post(traced: Backend, body: bytes, path: str = "", **headers: str) -> Pending:
    opened = ask(traced, body, path, **headers)
    assert not isinstance(opened, Reply), opened.body
    return opened


def ask(traced: Backend, body: bytes, path: str = "", **headers: str) -> Pending | Reply:
    return traced.serve("r", HttpRequest(path, body, "application/json", headers), threading.Event())


def only(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, dict[str, Any]]:
    (span,) = exporter.get_finished_spans()
    return span, dict(span.attributes or {})


def test_a_request_is_one_span_of_its_callers_trace(
    engine: FakeEngine, traced: Backend, exporter: InMemorySpanExporter
) -> None:
    body = b'{"prompt": "the wolf", "max_new_tokens": 7, "temperature": 0.5, "stop": ["the wolf"], "seed": 5}'
    opened = post(traced, body, traceparent=f"00-{TRACE}-{PARENT}-01")
    num_prompt_tokens = len(engine.submitted["r/0"][0])
    engine.say("r/0", [5], num_cached_tokens=1)
    assert opened.take() is not None
    engine.say("r/0", [6, 7], "length")
    reply = opened.take()
    assert reply is not None
    assert not reply.more
    assert not exporter.get_finished_spans()
    for _ in range(2):  # a front may say it twice
        traced.cancel(opened)
    span, attributes = only(exporter)
    assert (span.name, span.kind, span.status.status_code) == (NAME, SpanKind.SERVER, StatusCode.UNSET)
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert 0 < attributes.pop("gen_ai.latency.time_to_first_token") < 60
    assert attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "tpserve",
        "gen_ai.request.model": "llama",
        "gen_ai.response.model": "llama",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.choice.count": 1,
        "gen_ai.usage.input_tokens": num_prompt_tokens,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 1,
        "gen_ai.response.finish_reasons": ("length",),
    }
    assert SECRET not in span.to_json()


def test_a_chat_and_its_answers(engine: FakeEngine, traced: Backend, exporter: InMemorySpanExporter) -> None:
    body = b'{"model": "llama", "messages": [{"role": "user", "content": "the wolf"}], "n": 2}'
    opened = post(traced, body, "v1/chat/completions")
    engine.say("r/0", [5], "stop", index=0)
    assert opened.take() is None
    traced.cancel(opened)  # its client has gone before the second answer ended
    span, attributes = only(exporter)
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.response.finish_reasons"] == ("stop", "cancelled")
    assert span.parent is None
    assert SECRET not in span.to_json()


@pytest.mark.parametrize("by", ["engine", "front"])
def test_an_error_is_the_spans_status(
    engine: FakeEngine, traced: Backend, exporter: InMemorySpanExporter, by: str
) -> None:
    opened = post(traced, b'{"prompt": "the wolf"}')
    if by == "engine":
        engine.say("r/0", [], "error", error="a rank died")
    else:
        opened.fail("a rank died")
    assert opened.take() is not None
    traced.cancel(opened)
    span, attributes = only(exporter)
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "a rank died")
    assert attributes["error.type"] == "engine"
    assert "gen_ai.latency.time_to_first_token" not in attributes


def test_what_the_engine_did_not_take_has_no_span(
    engine: FakeEngine, traced: Backend, exporter: InMemorySpanExporter
) -> None:
    assert isinstance(ask(traced, b'{"prompt": 5}'), Reply)
    assert isinstance(settled(ask(traced, b"", "health")), Reply)
    engine.refusal = RequestError("too many", status=429)
    assert isinstance(ask(traced, b'{"prompt": "the wolf"}'), Reply)
    assert not exporter.get_finished_spans()


def test_a_senseless_parent_is_passed_over(engine: FakeEngine, traced: Backend, exporter: InMemorySpanExporter) -> None:
    traced.cancel(post(traced, b'{"prompt": "the wolf"}', traceparent="00-x", tracestate="\xff=,"))
    assert only(exporter)[0].parent is None


def test_trouble_with_spans_is_not_the_requests(
    engine: FakeEngine, traced: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(RequestTracer, "_begin", broken)
    opened = post(traced, b'{"prompt": "the wolf"}')
    engine.say("r/0", [5], "length")
    reply = opened.take()
    assert reply is not None
    assert reply.status == 200
    traced.cancel(opened)
    assert "broken" in caplog.text


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"},
        {"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_without_an_exporter_there_are_no_spans(environment: dict[str, str]) -> None:
    assert RequestTracer.from_environment(environment) is None


def test_what_is_not_installed_is_said(caplog: pytest.LogCaptureFixture) -> None:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "pigeon"}
    assert RequestTracer.from_environment(environment) is None
    assert "no exporter 'otlp' is installed" in caplog.text


def test_the_operators_variables_make_spans(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ReadableSpan] = []

    def export(_: ConsoleSpanExporter, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        seen.extend(spans)
        return SpanExportResult.SUCCESS

    monkeypatch.setattr(ConsoleSpanExporter, "export", export)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    tracer = RequestTracer.from_environment({"OTEL_TRACES_EXPORTER": "console"})
    assert tracer is not None
    traced = backend(engine)
    traced.tracer = tracer
    traced.cancel(post(traced, b'{"prompt": "the wolf"}'))
    tracer.provider.shutdown()
    (span,) = seen
    resource = span.resource.attributes
    assert (span.name, resource["service.name"], resource["deployment.environment"]) == (NAME, "tpserve", "test")


def test_nobody_imports_opentelemetry_in_vain() -> None:
    code = (
        "import sys; from tpserve.handler.service import RequestTracer;"
        "assert RequestTracer.from_environment({}) is None; sys.exit('opentelemetry' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

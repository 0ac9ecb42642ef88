"""One OpenTelemetry span a request, where the operator has its SDK installed and says by OTEL_… variables where to.

Otherwise nothing of OpenTelemetry is imported. A span says how long, how many and how it ended, never what was asked or
answered: no prompt, no text, no stop strings.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tpserve.handler.http import HttpRequest
from tpserve.handler.open_request import OpenAnswers, Pending
from tpserve.handler.replies import Reply

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

NAME = "tpserve.request"

_OTLP = {"grpc": ("otlp_proto_grpc",), "http/protobuf": ("otlp_proto_http",)}
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

logger = logging.getLogger(__name__)


class RequestSpan:
    """One request's span.

    Args:
        span: begun.
        started_ns: when the request was read, of `time.perf_counter_ns`.
    """

    def __init__(self, span: Span, started_ns: int) -> None:
        self._span = span
        self._started_ns: int | None = started_ns

    def heard(self) -> None:
        """Tokens have come; the first ones count."""
        if self._started_ns is not None:
            seconds = (time.perf_counter_ns() - self._started_ns) / 1e9
            self._started_ns = None
            self._span.set_attribute(
                "gen_ai.latency.time_to_first_token", seconds
            )  # vLLM's name; there is no other yet

    def end(self, opened: OpenAnswers) -> None:
        """Nothing more will be told; not to be called again."""
        from opentelemetry.trace import StatusCode

        usages = [completion.usage for completion in opened.completions]
        # What has not ended is of no use to anybody: its client went away, or another prompt's error ended it.
        reasons = [reason or "cancelled" for completion in opened.completions for reason in completion.finish_reasons]
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": sum(usage.prompt_tokens for usage in usages),
                "gen_ai.usage.output_tokens": sum(usage.completion_tokens for usage in usages),
                "gen_ai.usage.cache_read.input_tokens": sum(usage.cached_tokens for usage in usages),
                "gen_ai.response.finish_reasons": reasons,
            }
        )
        failure = opened.failure
        if failure is not None:
            self._span.set_attribute("error.type", "engine")
            self._span.set_status(StatusCode.ERROR, failure)
        self._span.end()


class RequestTracer:
    """Makes the spans. Its trouble is never a request's.

    Args:
        provider: with the exporters.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self._tracer = provider.get_tracer("tpserve", importlib.metadata.version("tpserve"))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> RequestTracer | None:
        """As the variables say that OpenTelemetry defines; None: they ask for nothing, or for what is not installed."""
        environment = os.environ if environment is None else environment
        if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
            return None
        provider = _present_provider()
        if provider is not None:
            return cls(provider)
        names = _exporter_names(environment)
        if not names:
            return None
        try:
            return cls(_make_provider(names, environment))
        except Exception as e:  # an exporter may have any trouble with its variables: serving goes on
            logger.warning("no OpenTelemetry spans: %s", e, exc_info=not isinstance(e, ImportError))
            return None

    def follow(self, start: Callable[[], Pending | Reply], request: HttpRequest, model_name: str) -> Pending | Reply:
        """Starts a request; its span begins here, if the engine took it, and ends with `end`.

        Args:
            start: what starts it.
            request: its headers may name the span that it is a part of (W3C's traceparent).
            model_name: what users call the model.
        """
        began_ns, started_ns = time.time_ns(), time.perf_counter_ns()
        opened = start()
        if isinstance(opened, OpenAnswers):
            try:
                opened.span = RequestSpan(self._begin(opened, request, model_name, began_ns), started_ns)
            except Exception:
                logger.exception("a span")
        return opened

    def end(self, pending: Pending) -> None:
        """Ends its span, if it has one that has not ended."""
        if not isinstance(pending, OpenAnswers) or pending.span is None:
            return
        span, pending.span = pending.span, None
        try:
            span.end(pending)
        except Exception:
            logger.exception("a span")

    def _begin(self, opened: OpenAnswers, request: HttpRequest, model_name: str, began_ns: int) -> Span:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        params = opened.completions[0].params
        # No seed: it may have 64 bits, and OTLP's integers have a sign.
        attributes = {
            "gen_ai.operation.name": "chat" if request.path == "v1/chat/completions" else "text_completion",
            "gen_ai.provider.name": "tpserve",
            "gen_ai.request.model": model_name,
            "gen_ai.response.model": model_name,
            "gen_ai.request.max_tokens": params.max_new_tokens,
            "gen_ai.request.temperature": float(params.temperature),
            "gen_ai.request.top_p": float(params.top_p),
            "gen_ai.request.choice.count": params.n,
        }
        context = extract(request.headers)
        return self._tracer.start_span(NAME, context, SpanKind.SERVER, attributes, start_time=began_ns)


def _present_provider() -> TracerProvider | None:
    """What `opentelemetry-instrument`, or whoever has loaded us, has set up already."""
    sdk: Any = sys.modules.get("opentelemetry.sdk.trace")
    if sdk is None:
        return None
    from opentelemetry.trace import get_tracer_provider

    provider: Any = get_tracer_provider()
    return provider if isinstance(provider, sdk.TracerProvider) else None


def _exporter_names(environment: Mapping[str, str]) -> list[str]:
    # The specification's default is OTLP to localhost; we do not look for a collector that nobody spoke of.
    default = "otlp" if any(environment.get(name) for name in _ENDPOINTS) else "none"
    names = [name.strip() for name in (environment.get("OTEL_TRACES_EXPORTER") or default).split(",")]
    return [name for name in names if name not in ("", "none")]


def _make_provider(names: list[str], environment: Mapping[str, str]) -> TracerProvider:
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ImportError("OTEL_… asks for them; pip install opentelemetry-sdk opentelemetry-exporter-otlp") from None
    exporters = [_find_exporter(name, environment) for name in names]
    resource = Resource.create()  # from OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
    if str(resource.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "tpserve"}))
    provider = TracerProvider(resource=resource)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter()))
    return provider


def _find_exporter(name: str, environment: Mapping[str, str]) -> Callable[[], Any]:
    entries: tuple[str, ...] = (name,)
    if name == "otlp":
        protocol = next((environment[variable] for variable in _PROTOCOLS if environment.get(variable)), None)
        either = (*_OTLP["http/protobuf"], *_OTLP["grpc"])
        entries = either if protocol is None else _OTLP.get(protocol, ())
    for entry in entries:
        for found in importlib.metadata.entry_points(group="opentelemetry_traces_exporter", name=entry):
            exporter: Callable[[], Any] = found.load()
            return exporter
    raise ImportError(f"no exporter {name!r} is installed; pip install opentelemetry-exporter-{name}")

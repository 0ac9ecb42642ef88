"""From a checked request to sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from tpserve.engine.errors import RequestError
from tpserve.engine.sampling_params import MAX_SEED, SamplingParams
from tpserve.handler.openai.sampling_schema import Request, Sampling

if TYPE_CHECKING:
    from tpserve.handler.backend import Backend

_SHARED = tuple(Sampling.model_fields)


def check_stream(asked: Request) -> None:
    """What goes with a stream and what only without one.

    Raises:
        RequestError: names the field.
    """
    if asked.stream_options is not None and not asked.stream:
        raise RequestError("stream_options goes with stream: true only", field="stream_options")
    if asked.stream and asked.prompt_logprobs not in (None, False):
        raise RequestError("prompt_logprobs is not available in a stream", field="prompt_logprobs")


def read_params(
    backend: Backend, given: Mapping[str, Any], own: Mapping[str, Any], max_new_tokens: int, guided_by: str | None
) -> SamplingParams:
    """Sampling parameters over OpenAI's defaults and the operator's.

    What shapes the reply is off unless it is asked for: an operator's default for it belongs to the predictions API.

    Args:
        backend: whose defaults hold.
        given: the request's fields as they were written, without nulls.
        own: the endpoint's own fields, in the reader's words.
        max_new_tokens: if the request does not say.
        guided_by: the field whose schema `own` has as `guided_json`, if any.

    Raises:
        RequestError: names the field.
    """
    fields = {name: given[name] for name in _SHARED if name in given}
    if guided_by is not None:
        for name in ("guided_json", "guided_regex", "guided_choice"):
            if name in fields:
                raise RequestError(f"the request has both {guided_by} and {name}; send one of them", field=name)
    if fields.get("top_k") == -1:  # vLLM's word for "off"
        fields["top_k"] = 0
    if "seed" in fields:
        fields["seed"] &= MAX_SEED  # OpenAI's seeds have a sign
    cap = backend.defaults.max_new_tokens_cap
    base = msgspec.structs.replace(
        backend.defaults.params, max_new_tokens=max_new_tokens if cap is None else min(max_new_tokens, cap),
        temperature=1.0, top_p=1.0, n=1, best_of=None, beam_width=1, logprobs=None, prompt_logprobs=None, echo=False,
        cum_log_probs=False,
    )  # fmt: skip
    try:
        return backend.reader.params({**fields, **own}, base, cap)
    except RequestError as e:
        if guided_by is None or e.field not in ("guided_json", "guided"):
            raise
        raise RequestError(f"{guided_by}: {e}", field=guided_by) from None

"""What travels between processes: msgpack data by msgspec, never pickle. Also the engine's public request types."""

from __future__ import annotations

import math

import msgspec

from tpserve.engine.errors import RequestError

MAX_SEED = 2**64 - 1


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How one request's tokens are chosen.

    Attributes:
        max_new_tokens: at most so many tokens; the context's end stops earlier.
        temperature: logits are divided by it; 0: greedy.
        top_p: keep the smallest set of most probable tokens whose probability reaches this; 1: all.
        top_k: keep the k most probable tokens; 0: all.
        seed: of the counter-based generator; None: drawn once at admission.
        logprobs: return each generated token's log-probability under the unmodified distribution.
        ignore_eos: go on after the end-of-sequence token.
        stop_token_ids: further tokens that end the request; like EOS they are not part of its output.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    logprobs: bool = False
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def validate(self) -> None:
        """Checks every field.

        Raises:
            RequestError: with the field's name and the value.
        """
        _check(self.max_new_tokens >= 1, "max_new_tokens", "must be at least 1", self.max_new_tokens)
        _check(math.isfinite(self.temperature) and 0 <= self.temperature <= 100, "temperature",
               "must be a number from 0 to 100", self.temperature)  # fmt: skip
        _check(0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1", self.top_p)
        _check(0 <= self.top_k < 2**31, "top_k", "must be 0 (off) or positive", self.top_k)
        _check(self.seed is None or 0 <= self.seed <= MAX_SEED, "seed", "must be from 0 to 2**64 - 1", self.seed)
        _check(len(self.stop_token_ids) <= 64, "stop_token_ids", "must hold at most 64 ids", len(self.stop_token_ids))


def _check(ok: bool, field: str, rule: str, value: object) -> None:
    if not ok:
        raise RequestError(f"{field} {rule}, got {value!r}", field=field)


class Add(msgspec.Struct, frozen=True, tag="add"):
    """Admit a request. `output_token_ids` were generated before (by a group that died): generation goes on after."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    output_token_ids: list[int] = []


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Drop a request; unknown ids are ignored (it may just have ended)."""

    request_id: str


class Report(msgspec.Struct, frozen=True, tag="report"):
    """Ask every rank how it is; answered by one `Status`."""

    report_id: int


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End the group."""


Event = Add | Cancel | Report | Stop


class StepMessage(msgspec.Struct, frozen=True, array_like=True):
    """Rank 0 to the others, once a step: what happens before it."""

    step: int
    events: list[Event]


class RankStatus(msgspec.Struct, frozen=True):
    """One rank's state after a step; `error` is set when it is about to die."""

    rank: int
    step: int
    checksum: int
    num_blocks_in_use: int
    report_id: int | None = None
    error: str | None = None


class RequestOutput(msgspec.Struct, frozen=True, tag="output"):
    """New tokens of one request.

    Attributes:
        token_ids: generated since the last output; the token that stopped the request is left out.
        logprobs: one a token id, natural logarithm, when the request asked for them.
        finish_reason: None while it runs; "stop" (EOS or a stop token), "length", "cancelled" or "error".
        error: what happened, with finish_reason "error".
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[float] | None = None
    finish_reason: str | None = None
    error: str | None = None


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The group can make tokens."""

    tensor_parallel_size: int
    num_blocks: int
    block_size: int
    max_seq_len: int
    device: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The group cannot start, and would not the next time: the configuration or the checkpoint is at fault."""

    message: str


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """The step loop turns; sent at least once a second."""

    step: int
    num_running: int
    num_waiting: int
    num_blocks_in_use: int
    num_preemptions: int


class Status(msgspec.Struct, frozen=True, tag="status"):
    """Answer to `Report`: every rank's state after the same step."""

    report_id: int
    ranks: list[RankStatus]


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """All requests' new tokens of one step."""

    outputs: list[RequestOutput]


Reply = Ready | Failed | Heartbeat | Status | Outputs

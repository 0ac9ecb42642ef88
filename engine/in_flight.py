"""The client's books: which requests are under way, what each has said, and when it must have ended."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tpserve.engine.metrics import EngineMetrics
from tpserve.engine.protocol import Add, Choice, Outputs, RequestOutput
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.suspects import Suspects

_RATE_WINDOW_S = 60.0
_MAX_RETRY_AFTER_S = 60


class NewRequest(NamedTuple):
    """What is asked for; see `EngineClient.submit`."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    on_output: Callable[[RequestOutput], None]


@dataclasses.dataclass(slots=True)
class _Said:
    token_ids: list[int] = dataclasses.field(default_factory=list)
    last_s: float | None = None


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """One request.

    Attributes:
        deadline_s: on the monotonic clock, as `submitted_s`.
        running: its answers that have not ended, and their tokens so far.
        scheduled: a step has had a part of it.
        begun: there has been a token, or an answer's end.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    on_output: Callable[[RequestOutput], None]
    priority: int
    submitted_s: float
    deadline_s: float = math.inf
    running: dict[int, _Said] = dataclasses.field(default_factory=dict)
    scheduled: bool = False
    begun: bool = False

    def __post_init__(self) -> None:
        n = self.params.n if self.params.beam_width > 1 else self.params.num_choices
        self.running = {index: _Said() for index in range(n)}

    def event(self) -> Add:
        """What tells a group to begin, or to go on where another one died; a beam search begins again."""
        choices: list[Choice] = []
        if self.begun and self.params.beam_width == 1:
            choices = [Choice(index, said.token_ids) for index, said in self.running.items()]
        return Add(self.request_id, self.prompt_token_ids, self.params, choices, self.priority)

    def last_outputs(self, finish_reason: str, error: str | None = None) -> list[RequestOutput]:
        """Ends every answer that has not ended."""
        indices, self.running = list(self.running), {}
        return [
            RequestOutput(self.request_id, finish_reason=finish_reason, error=error, index=index) for index in indices
        ]


class Requests:
    """All requests in flight. Its callers hold the client's lock.

    Args:
        metrics: what happens is counted there.
        suspects: told who has got a token, and who has ended.
    """

    def __init__(self, metrics: EngineMetrics, suspects: Suspects) -> None:
        self._metrics, self._suspects = metrics, suspects
        self._by_id: dict[str, Request] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap; entries of ended requests are dropped when they come up
        self._ended_s: deque[float] = deque(maxlen=256)

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def __getitem__(self, request_id: str) -> Request:
        return self._by_id[request_id]

    def all(self) -> Iterable[Request]:
        """Every request, in order of submission."""
        return self._by_id.values()

    def add(self, request: Request) -> None:
        """Takes a new one."""
        self._by_id[request.request_id] = request
        if request.deadline_s < math.inf:
            if len(self._deadlines) > 2 * len(self._by_id) + 64:
                self._deadlines = [(r.deadline_s, r.request_id) for r in self.all() if r.deadline_s < math.inf]
                heapq.heapify(self._deadlines)
            else:
                heapq.heappush(self._deadlines, (request.deadline_s, request.request_id))

    def take(self, outputs: Outputs, now_s: float) -> list[tuple[Request, RequestOutput]]:
        """Books one step's outputs; returns those that somebody still waits for."""
        for request_id in outputs.scheduled:
            scheduled = self._by_id.get(request_id)
            if scheduled is not None and not scheduled.scheduled:  # a replay is not counted again
                scheduled.scheduled = True
                self._metrics.queue_time.observe(now_s - scheduled.submitted_s)
        wanted = []
        for output in outputs.outputs:
            request = self._by_id.get(output.request_id)
            said = None if request is None else request.running.get(output.index)
            if request is None or said is None:  # cancelled meanwhile
                continue
            wanted.append((request, output))
            if output.token_ids:
                self._count(request, said, output, now_s)
            if output.finish_reason is not None:
                self._end(request, output.index, output.finish_reason, now_s)
        return wanted

    def cancel(self, request_id: str, index: int | None, now_s: float) -> bool:
        """Forgets a request, or one of its answers; whether there was one."""
        request = self._by_id.get(request_id)
        if request is None or (index is not None and index not in request.running):
            return False
        if index is not None:  # whoever cancels a single answer has found the end of it
            self._end(request, index, "stop", now_s)
        else:
            self.remove(request, "cancelled")
        return True

    def expired(self, now_s: float) -> list[Request]:
        """Removes the requests whose time is over."""
        found = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            deadline_s, request_id = heapq.heappop(self._deadlines)
            request = self._by_id.get(request_id)
            if request is not None and request.deadline_s == deadline_s:  # not a later one of the same id
                self.remove(request, "timeout")
                found.append(request)
        return found

    def remove(self, request: Request, finish_reason: str) -> None:
        """Forgets a request that ends before the engine says so."""
        del self._by_id[request.request_id]
        self._suspects.ended(request.request_id)
        self._metrics.request_ended(finish_reason)

    def retry_after_s(self, num_waiting: int, now_s: float) -> int:
        """When the queue will have moved on, at the rate of the last minute."""
        recent = [s for s in self._ended_s if now_s - s <= _RATE_WINDOW_S]
        if recent:
            estimate_s = num_waiting * max(now_s - recent[0], 1.0) / len(recent)
        else:  # nobody has ended yet: at least as long as the first one has been waiting
            estimate_s = max((now_s - request.submitted_s for request in self.all()), default=0.0)
        return max(1, min(math.ceil(estimate_s), _MAX_RETRY_AFTER_S))

    def _count(self, request: Request, said: _Said, output: RequestOutput, now_s: float) -> None:
        n = len(output.token_ids)
        self._suspects.proven(request.request_id)
        said.token_ids += output.token_ids
        if not request.begun:
            request.begun = True
            self._metrics.time_to_first_token.observe(now_s - request.submitted_s)
            self._metrics.prompt_tokens += len(request.prompt_token_ids)
        elif said.last_s is not None:
            self._metrics.inter_token_latency.observe((now_s - said.last_s) / n, n)
        said.last_s = now_s
        self._metrics.generation_tokens += n

    def _end(self, request: Request, index: int, finish_reason: str, now_s: float) -> None:
        request.begun = True
        del request.running[index]
        if request.running:
            return
        del self._by_id[request.request_id]
        self._suspects.ended(request.request_id)
        self._ended_s.append(now_s)
        self._metrics.request_ended(finish_reason, now_s - request.submitted_s)

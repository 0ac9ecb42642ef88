"""The replicated state machine: the same events in the same order give the same steps on every rank."""

from __future__ import annotations

import dataclasses
import zlib

from tpserve.engine.block_pool import BlockPool
from tpserve.engine.config import EngineConfig
from tpserve.engine.model_runner import ModelRunner
from tpserve.engine.protocol import Add, Cancel, Event, RankStatus, Report, RequestOutput, Stop
from tpserve.engine.scheduler import Scheduler
from tpserve.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class CoreShape:
    """What loading the model found out.

    Attributes:
        num_blocks: KV blocks of every rank.
        max_seq_len: longest sequence that is served, in tokens.
        eos_token_id: of the tokenizer; None without one.
    """

    num_blocks: int
    max_seq_len: int
    eos_token_id: int | None


class EngineCore:
    """One rank's engine: applies events, runs steps.

    Args:
        config: the engine's configuration.
        shape: what loading found out.
        runner: this rank's part of the network.
        rank: this rank.
    """

    def __init__(self, config: EngineConfig, shape: CoreShape, runner: ModelRunner, rank: int) -> None:
        self.shape, self.rank = shape, rank
        self.pool = BlockPool(shape.num_blocks)
        self.scheduler = Scheduler(
            self.pool,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self.step_count = 0
        self.checksum = 0  # CRC-32 over every decision so far
        self.stopped = False
        self._runner = runner
        self._reports: list[int] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return self.scheduler.has_work

    def apply(self, events: list[Event]) -> None:
        """Takes in what rank 0 ordered before this step."""
        for event in events:
            match event:
                case Add():
                    self.scheduler.add(self._sequence(event))
                case Cancel(request_id):
                    self.scheduler.cancel(request_id)
                case Report(report_id):
                    self._reports.append(report_id)
                case Stop():
                    self.stopped = True

    def step(self) -> list[RequestOutput]:
        """Runs one step if there is work; returns the requests' new tokens."""
        outputs = self._compute() if self.has_work else []
        self.step_count += 1
        return outputs

    def _compute(self) -> list[RequestOutput]:
        plan = self.scheduler.schedule()
        result = self._runner.run(plan)
        sampled = self.scheduler.update(plan, result.tokens)
        decisions = [(entry.seq.request_id, entry.num_query_tokens) for entry in plan]
        self.checksum = zlib.crc32(f"{decisions}{result.tokens}{self.pool.num_free}".encode(), self.checksum)
        if not self.scheduler.has_work:
            self.scheduler.check_integrity()
        return [
            _output(token.seq.request_id, token.token_id, token.finish_reason, logprob)
            for token, logprob in zip(sampled, result.logprobs, strict=True)
        ]

    def take_reports(self) -> list[RankStatus]:
        """Answers to the `Report` events applied so far."""
        reports, self._reports = self._reports, []
        return [self.status(report_id) for report_id in reports]

    def status(self, report_id: int | None = None) -> RankStatus:
        """This rank's state now."""
        return RankStatus(self.rank, self.step_count, self.checksum, self.pool.num_in_use, report_id)

    def _sequence(self, event: Add) -> Sequence:
        return Sequence(
            event.request_id,
            event.prompt_token_ids,
            event.params,
            max_seq_len=self.shape.max_seq_len,
            eos_token_id=self.shape.eos_token_id,
            output_token_ids=event.output_token_ids,
        )


def _output(request_id: str, token_id: int | None, finish_reason: str | None, logprob: float | None) -> RequestOutput:
    if token_id is None:
        return RequestOutput(request_id, [], None if logprob is None else [], finish_reason)
    return RequestOutput(request_id, [token_id], None if logprob is None else [logprob], finish_reason)

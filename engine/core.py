"""The replicated state machine: the same events in the same order give the same steps on every rank."""

from __future__ import annotations

import dataclasses
import zlib
from array import array
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tpserve.engine.beam_search import BeamGroup
from tpserve.engine.block_pool import BlockPool
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import RequestError
from tpserve.engine.guided import Grammars
from tpserve.engine.outputs import beam_outputs, output
from tpserve.engine.protocol import Add, Cancel, Choice, Event, Outputs, RankStatus, Report, RequestOutput, Stop, Trace
from tpserve.engine.scheduler import Scheduler
from tpserve.engine.sequence import Sequence
from tpserve.engine.step import StepPlan, StepResult
from tpserve.engine.tracer import Tracer
from tpserve.model.philox import choice_seed


@dataclasses.dataclass(frozen=True)
class CoreShape:
    """What loading the model found out.

    Attributes:
        num_blocks: KV blocks of every rank.
        max_seq_len: longest sequence that is served, in tokens.
        eos_token_ids: that end a turn; empty without a tokenizer.
        vocab_size: of the logits.
        decode_steps: tokens that a sequence which runs alone draws in one plan.
    """

    num_blocks: int
    max_seq_len: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    decode_steps: int = 1


class Runner(Protocol):
    """The device: `ModelRunner`, or what stands for it in tests; a step has `num_draws` and `device_ns`."""

    def launch(self, plan: StepPlan, timed: bool = False) -> Any: ...
    def draw(self, step: Any, masks: NDArray[np.int32] | None) -> None: ...
    def finish(self, step: Any) -> StepResult: ...
    def close(self) -> None: ...
    def improve(self, idle: bool) -> None: ...
    @property
    def improvable(self) -> bool: ...


class EngineCore:
    """One rank's engine: applies events, runs steps.

    Args:
        config: the engine's configuration.
        shape: what loading found out.
        runner: this rank's part of the network.
        rank: this rank.
        grammars: for guided requests; None: there is no tokenizer.

    Attributes:
        unchecked: whether there has been work since `check_integrity` last looked.
    """

    def __init__(
        self, config: EngineConfig, shape: CoreShape, runner: Runner, rank: int, grammars: Grammars | None = None
    ) -> None:
        self.shape, self.rank = shape, rank
        self.pool = BlockPool(shape.num_blocks, caching=config.enable_prefix_caching)
        self.scheduler = Scheduler(self.pool, config, shape.decode_steps)
        self.tracer = Tracer(rank)
        self.step_count = 0
        self.checksum = 0  # CRC-32 over every decision so far
        self.stopped = False
        self._runner = runner
        self._grammars = grammars
        self._under_way: tuple[StepPlan, Any] | None = None
        self._outputs: list[RequestOutput] = []
        self._arrivals = 0
        self.unchecked = False
        self._reports: list[int] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything, or one is under way."""
        return self.scheduler.has_work or self._under_way is not None

    @property
    def is_idle(self) -> bool:
        """Whether the next step may wait for requests: there is nothing to compute, and nothing to make faster."""
        return not (self.has_work or self._runner.improvable)

    def apply(self, events: list[Event]) -> None:
        """Takes in what rank 0 ordered before this step."""
        for event in events:
            match event:
                case Add():
                    self._add(event)
                case Cancel(request_id, index):
                    self.scheduler.cancel(request_id, index)
                case Report(report_id):
                    self._reports.append(report_id)
                case Trace(trace_id, num_steps):
                    self.tracer.start(trace_id, num_steps)
                case Stop():
                    self.stopped = True

    def step(self) -> Outputs:
        """Starts the next step on the device, and returns what the one before it drew."""
        trace = self.tracer
        scheduled: list[str] = []
        if self._under_way is not None and self.scheduler.must_wait:
            self._finish()
        started: tuple[StepPlan, Any] | None = None
        if self.scheduler.has_work:
            self.unchecked = True
            with trace.span("schedule"):
                plan = self.scheduler.schedule()
            if plan.entries:
                scheduled = plan.scheduled
                with trace.span("launch", tokens=plan.num_tokens):
                    step = self._runner.launch(plan, trace.active)
                masks = None
                if plan.guided:
                    if self._under_way is not None:
                        self._finish()  # masks depend on the tokens before
                    with trace.span("masks"):
                        masks = self._masks(plan, step.num_draws)
                self._runner.draw(step, masks)
                started = plan, step
        if self._under_way is not None:
            self._finish()
        self._under_way = started
        if self._runner.improvable:  # on all ranks alike: they have done the same steps
            with trace.span("improve"):
                self._runner.improve(idle=not self.has_work)
        self.step_count += 1
        trace.end_step()
        outputs, self._outputs = self._outputs, []
        return Outputs(outputs, scheduled)

    def check_integrity(self) -> None:
        """Asserts that the books are right, when there is nothing else to do: it looks at every block."""
        if not self.has_work and self.unchecked:
            self.unchecked = False
            self.scheduler.check_integrity()

    def close(self) -> None:
        """Lets go of what must not outlive the process group."""
        self._runner.close()

    def take_reports(self) -> list[RankStatus]:
        """Answers to the `Report` events applied so far."""
        reports, self._reports = self._reports, []
        return [self.status(report_id) for report_id in reports]

    def status(self, report_id: int | None = None) -> RankStatus:
        """This rank's state now."""
        return RankStatus(self.rank, self.step_count, self.checksum, self.pool.num_in_use, report_id)

    def _finish(self) -> None:
        """Waits for the step under way and takes in what it drew."""
        assert self._under_way is not None
        (plan, step), self._under_way = self._under_way, None
        with self.tracer.span("wait"):
            result = self._runner.finish(step)
        self.tracer.device(step.device_ns)
        with self.tracer.span("update"):
            for i, logprobs in result.prompt_logprobs.items():
                plan.entries[i].seq.prompt_logprobs += logprobs
            progress = self.scheduler.update(plan, result)
            for done in progress:
                if done.seq.group is not None:
                    self._outputs += beam_outputs(done.seq)
                else:
                    self._outputs.append(output(done, result))
            decisions = array("q", result.tokens)
            decisions += array("q", (plan.num_tokens, len(plan.entries), self.pool.num_free, self.pool.num_cached))
            self.checksum = zlib.crc32(decisions, self.checksum)

    def _masks(self, plan: StepPlan, num_draws: int) -> NDArray[np.int32]:
        """What each draw may be, as bits; int32 [draws, ⌈V/32⌉]."""
        masks = np.full((num_draws, -(-self.shape.vocab_size // 32)), -1, dtype=np.int32)
        draw = 0
        for entry in plan.entries:
            for seq in entry.samples:
                matcher = seq.matcher
                if matcher is not None and not seq.finished:
                    matcher.fill_mask(masks[draw])
                    for i, token in enumerate(entry.drafts, start=1):
                        allowed = matcher.advance(token)
                        assert allowed, "a draft that the grammar forbids"
                        matcher.fill_mask(masks[draw + i])
                    matcher.rollback(len(entry.drafts))
                draw += 1 + len(entry.drafts)
        return masks

    def _add(self, event: Add) -> None:
        self._arrivals += 1
        key = (event.priority, self._arrivals)
        choices = event.choices or [Choice(0, [])]
        try:
            seqs = [self._sequence(event, choice, key) for choice in choices]
            if not event.choices:
                rest = range(1, event.params.num_choices)
                seqs[0].children = [self._sequence(event, Choice(index, []), key) for index in rest]
        except RequestError as e:  # the client has checked it; whatever it is, it is this request's alone
            self._outputs.append(RequestOutput(event.request_id, finish_reason="error", error=str(e)))
            return
        for seq in seqs:
            if event.params.beam_width > 1:
                seq.group = BeamGroup(event.params, seq)
            self.scheduler.add(seq)

    def _sequence(self, event: Add, choice: Choice, key: tuple[int, int]) -> Sequence:
        seq = Sequence(
            event.request_id,
            event.prompt_token_ids,
            event.params,
            max_seq_len=self.shape.max_seq_len,
            eos_token_ids=self.shape.eos_token_ids,
            output_token_ids=choice.output_token_ids,
            index=choice.index,
            seed=choice_seed(event.params.seed or 0, choice.index),
            key=key,
        )
        if choice.output_token_ids:
            seq.said = True
        if event.params.guided is not None:
            if self._grammars is None:
                raise RequestError("this model has no tokenizer: output cannot be guided", field="guided")
            seq.matcher = self._grammars.matcher(event.params.guided)
            for token in choice.output_token_ids:
                seq.matcher.advance(token)
        return seq

"""One step on the device: a plan goes in, drawn tokens come out.

The work of a step is two jobs on the device queue, the network and the draws, so that a grammar's masks may be made
while the network runs. Jobs read nothing that the host may still change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tpserve.engine.batch import DrawBuilder, Draws
from tpserve.engine.config import EngineConfig
from tpserve.engine.device_queue import DeviceQueue, Job, device_clock, device_queue
from tpserve.engine.prompt_rows import PromptRows, pairs
from tpserve.engine.rows import Array, BatchState, Changes, Parcel, Uploader
from tpserve.engine.sequence import Sequence
from tpserve.engine.step import Candidate, StepPlan, StepResult
from tpserve.model.attention import SequenceSlice
from tpserve.model.kv_cache import PagedKVCache
from tpserve.model.logits import logprobs_of, process_logits, token_logprobs, top_logprobs
from tpserve.model.network import Network, StepInputs


class Step:
    """A step under way.

    Attributes:
        num_draws: tokens that its first step draws.
        following: further steps, of a sequence alone.
        device_ns: start and end of its work on the device, once it is finished, if it was to be timed.
    """

    def __init__(self, draws: Draws | None, network: Job[torch.Tensor], prompt: PromptRows | None) -> None:
        self.draws, self.network, self.prompt = draws, network, prompt
        self.num_draws = 0 if draws is None else len(draws.seqs)
        self.following: list[tuple[StepInputs, Draws]] = []
        self.fetched: Job[_Fetched] | None = None
        self.marks: list[Any] = []
        self.device_ns: list[int] = []


@dataclasses.dataclass
class _Fetched:
    """A step's results on their way to the host; on CUDA the event says when they are there."""

    tensors: dict[str, torch.Tensor]
    event: torch.cuda.Event | None


class ModelRunner:
    """Runs plans on this rank.

    Args:
        make_network: from the rows' tokens and block tables to the network that reads them.
        vocab_size: of its logits.
        device: where it is.
        cache: its KV cache.
        config: sizes.
        queue: of the device; None: a new one.
    """

    def __init__(
        self,
        make_network: Callable[[torch.Tensor, torch.Tensor], Network],
        vocab_size: int,
        device: torch.device,
        cache: PagedKVCache,
        config: EngineConfig,
        queue: DeviceQueue | None = None,
    ) -> None:
        self._cache, self._device = cache, device
        self._state = BatchState(
            config.max_num_seqs, config.max_seq_len, -(-config.max_seq_len // config.block_size), device
        )
        self.network = make_network(self._state.tokens_RL, self._state.tables_RB)
        self._upload = Uploader(device)
        self._draws = DrawBuilder(vocab_size, self._upload)
        self._queue, self._clock = queue or device_queue(device), device_clock(device)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Does what would otherwise delay the first steps; on several ranks, all do it together."""
        self.network.warm_up()

    @property
    def improvable(self) -> bool:
        """Whether `improve` has anything left to do."""
        return self.network.improvable

    def improve(self, idle: bool) -> None:
        """See `Network.improve`; between `draw` and the next `launch`."""
        self._queue.submit(lambda: self.network.improve(idle)).result()

    def close(self) -> None:
        """Lets go of what holds on to the process group."""
        self.network.close()

    def launch(self, plan: StepPlan, timed: bool = False) -> Step:
        """Starts the network on a plan; `draw` must follow.

        Args:
            plan: the step.
            timed: whether its time on the device will be asked for.
        """
        # Hundreds of decoding sequences are the common case: what they need is gathered without a loop over them.
        num_decodes = sum(entry.num_query_tokens == 1 and len(entry.samples) == 1 for entry in plan.entries)
        decodes, others = plan.entries[:num_decodes], plan.entries[num_decodes:]
        drawing = [entry.seq for entry in decodes]
        flat = np.empty((2, plan.num_tokens), dtype=np.int64)  # rows, positions
        flat[0, :num_decodes] = [_row(seq) for seq in drawing]
        flat[1, :num_decodes] = positions = [entry.start for entry in decodes]
        draw_positions = [position + 1 for position in positions]
        decode_lens = draw_positions.copy()
        draw_rows = list(range(num_decodes))
        prefills = []
        chunks: list[tuple[int, int, int]] = []  # row, first token in the step, tokens before it
        end = num_decodes
        for entry in others:
            start, n = entry.start, entry.num_query_tokens
            chunks.append((_row(entry.seq), end, start))
            prefills.append(SequenceSlice(start, n))
            flat[0, end : end + n] = _row(entry.seq)
            flat[1, end : end + n] = np.arange(start, start + n)
            end += n
            for seq in entry.samples:
                for i in range(len(entry.drafts), -1, -1):
                    drawing.append(seq)
                    draw_rows.append(end - 1 - i)
                    draw_positions.append(start + n - i)
        prompt = PromptRows.of(plan, self._upload)
        copies = self._upload(list(zip(*plan.copies, strict=True)), np.int64) if plan.copies else None
        draw_rows += [] if prompt is None else prompt.rows
        all_drawn = len(draw_rows) == end and draw_rows == list(range(end))
        parcel = Parcel()
        rows_at, positions_at = parcel.add(flat[0]), parcel.add(flat[1])
        chunks_at = parcel.add(list(zip(*chunks, (0, end, 0), strict=True))) if chunks else None
        logits_at = None if all_drawn else parcel.add(draw_rows)
        changes = Changes.of(plan, parcel)
        sent = parcel.send(self._upload)
        inputs = StepInputs(
            rows_T=sent[rows_at],
            positions_T=sent[positions_at],
            decode_lens=decode_lens,
            prefills=prefills,
            chunks_3P=None if chunks_at is None else sent[chunks_at],
            logits_rows_N=None if logits_at is None else sent[logits_at],
        )
        marks: list[Any] = []

        def network() -> torch.Tensor:
            if timed:
                marks.append(self._clock.mark())
            changes.apply(self._state, sent)
            if copies is not None:
                self._cache.copy_blocks(copies[0], copies[1])
            return self.network(inputs)

        computed = self._queue.submit(network)
        # What only the draws need is made while the device has something to do.
        drawn = self.network.drawn_N is not None  # on CUDA; on a CPU the network may not have begun, and never draws
        draws = self._draws.build(drawing, draw_positions, send=not drawn) if drawing else None
        step = Step(draws, computed, prompt)
        step.marks = marks
        for i in range(1, plan.entries[0].num_steps):  # of a sequence alone
            later = dataclasses.replace(
                inputs, positions_T=inputs.positions_T + i, decode_lens=[n + i for n in decode_lens]
            )
            step.following.append((later, self._draws.build(drawing, [p + i for p in draw_positions])))
        return step

    def draw(self, step: Step, masks: Array | None) -> None:
        """Starts the draws of a launched step.

        Args:
            step: what `launch` returned.
            masks: int32 [draws, ⌈V/32⌉], a bit a token that a grammar allows; None: no grammar.
        """
        allowed = None if masks is None else self._upload(masks)

        def draws() -> _Fetched:
            fetched = _Fetched({}, None)
            if step.draws is not None:
                logits_NV = step.network.result()
                drawn_NV = logits_NV if step.prompt is None else logits_NV[: step.num_draws]
                self._draw(step.draws, drawn_NV, allowed, fetched.tensors)
            if step.following:
                assert self.network.drawn_N is None, "the next call would write over the tokens"
                drawn = [fetched.tensors]
                for inputs, later in step.following:
                    drawn.append({})
                    self._draw(later, self.network(inputs), None, drawn[-1])
                fetched.tensors = {name: torch.cat([each[name] for each in drawn]) for name in drawn[0]}
            if step.prompt is not None:
                step.prompt.compute(step.network.result()[step.num_draws :], fetched.tensors)
            if self._device.type == "cuda":
                fetched.tensors = {name: _on_its_way(tensor) for name, tensor in fetched.tensors.items()}
                fetched.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                fetched.event.record()
            if step.marks:
                step.marks.append(self._clock.mark())
            return fetched

        step.fetched = self._queue.submit(draws)

    def finish(self, step: Step) -> StepResult:
        """Waits for a step's tokens.

        Raises:
            RuntimeError: whatever the device said.
        """
        assert step.fetched is not None, "draw comes before finish"
        fetched = step.fetched.result()  # one wait a step: the draws come behind the network, and fail where it failed
        step.network.result()
        if fetched.event is not None:
            fetched.event.synchronize()
        step.device_ns = [self._clock.read_ns(mark) for mark in step.marks]
        host = {name: tensor.tolist() for name, tensor in fetched.tensors.items()}
        result = StepResult(
            tokens=host.get("tokens", []),
            logprobs=host.get("logprobs"),
            top_logprobs=pairs(host["top_ids"], host["top_logprobs"]) if "top_ids" in host else None,
        )
        if "candidate_ids" in host:
            columns = zip(host["candidate_ids"], host["candidate_logprobs"], host["candidate_raw"], strict=True)
            assert step.draws is not None
            for i, (ids, logprobs, raw) in zip(step.draws.static.beams, columns, strict=True):
                result.candidates[i] = [Candidate(*c) for c in zip(ids, logprobs, raw, strict=True)]
        if step.prompt is not None:
            result.prompt_logprobs.update(step.prompt.read(host))
        return result

    def _draw(
        self, draws: Draws, raw_NV: torch.Tensor, allowed: torch.Tensor | None, out: dict[str, torch.Tensor]
    ) -> None:
        static, processed_NV, drawn_N = draws.static, raw_NV, self.network.drawn_N
        if static.is_greedy and allowed is None:
            if drawn_N is None:
                drawn_N = self.network.draw_greedy(raw_NV, static.rows_N, draws.device_positions)
            tokens_N = drawn_N
        else:
            batch = draws.batch(self._state, allowed)
            processed_NV = process_logits(raw_NV, batch)
            tokens_N = self.network.draw(processed_NV, batch, static.rows_N)
            draws.decay(self._state, tokens_N)
        out["tokens"] = tokens_N
        num_top, beams = static.num_top_logprobs, static.beams
        if num_top is not None:
            out["logprobs"] = token_logprobs(raw_NV, tokens_N)
            if num_top:
                out["top_logprobs"], out["top_ids"] = top_logprobs(raw_NV, min(num_top, raw_NV.shape[1]))
        if beams:
            k = max(draws.seqs[i].group.num_candidates for i in beams)  # type: ignore[union-attr]
            own = slice(None) if len(beams) == len(draws.seqs) else beams
            values, ids = top_logprobs(processed_NV[own], min(k, raw_NV.shape[1]))
            out["candidate_logprobs"], out["candidate_ids"] = values, ids
            out["candidate_raw"] = logprobs_of(raw_NV[own], ids)


def _row(seq: Sequence) -> int:
    assert seq.row is not None, "a sequence was planned that holds no row"
    return seq.row


def _on_its_way(tensor: torch.Tensor) -> torch.Tensor:
    """A host tensor that the stream will fill. Pinned: into pageable memory the copy would wait for the device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

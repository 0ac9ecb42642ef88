"""An engine of one rank in this process: no start-up, every counter in reach, steps when they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from tpserve.engine.config import EngineConfig
from tpserve.engine.group import build_core
from tpserve.engine.limits import check_prompt, check_sequences, check_vocabulary
from tpserve.engine.protocol import Add, Event, RequestOutput
from tpserve.engine.sampling_params import SamplingParams
from tpserve.model.parallel import TensorParallel


class LocalEngine:
    """Takes requests as `EngineClient` does; `run` computes them.

    Args:
        config: of a CPU engine at TP 1.

    Attributes:
        core: the engine.
        num_steps: made so far.
        peak_blocks: most KV blocks that had an owner at the end of a step, since it was last set to 0.
    """

    def __init__(self, config: EngineConfig) -> None:
        assert config.tensor_parallel_size == 1
        self.config = config
        self.core = build_core(config, torch.device("cpu"), TensorParallel())
        self.num_steps = self.peak_blocks = 0
        self._events: list[Event] = []
        self._takers: dict[str, Callable[[RequestOutput], None]] = {}

    def submit(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        on_output: Callable[[RequestOutput], None],
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> None:
        """See `EngineClient.submit`; the request begins with the next step."""
        assert timeout_s is None, "nobody watches the clock here"
        params.validate()
        check_prompt(prompt_token_ids, self.config.max_seq_len, self.core.shape.vocab_size)
        check_vocabulary(params, self.core.shape.vocab_size)
        check_sequences(params, self.config.max_num_seqs)
        self._takers[request_id] = on_output
        add = Add(request_id, prompt_token_ids, params, priority=priority)
        self._events.append(msgspec.msgpack.decode(msgspec.msgpack.encode(add), type=Add))

    def step(self) -> None:
        """One step with what was submitted before."""
        events, self._events = self._events, []
        self.core.apply(events)
        for output in self.core.step().outputs:
            self._takers[output.request_id](output)
        self.core.scheduler.check_integrity()
        self.num_steps += 1
        self.peak_blocks = max(self.peak_blocks, self.core.pool.num_in_use)

    def run(self) -> None:
        """Steps until nothing is left to do, and sees that everything was given back."""
        while self._events or self.core.has_work:
            self.step()
        assert self.core.pool.num_in_use == 0

"""A scheduler on a small cache, and a device that says of every token what it has read."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from tpserve.engine.beam_search import BeamGroup
from tpserve.engine.block_pool import BlockPool
from tpserve.engine.config import EngineConfig
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.scheduler import Scheduler
from tpserve.engine.sequence import Sequence
from tpserve.engine.step import Candidate, ScheduledSequence, StepPlan, StepResult

BLOCK, BLOCKS, MAX_LEN, MAX_SEQS, BUDGET = 4, 14, 40, 5, 12
EOS = 2
# Prompts begin alike, so that they meet in the prefix cache; few tokens, so that drafts are often right.
TEXT = [100 + i % 7 for i in range(MAX_LEN)]


def make_config(**changes: Any) -> EngineConfig:
    defaults = {
        "checkpoint_dir": "", "block_size": BLOCK, "max_num_seqs": MAX_SEQS, "max_num_batched_tokens": BUDGET,
        "max_seq_len": MAX_LEN,
    }  # fmt: skip
    return EngineConfig(**(defaults | changes))


def make_sequence(
    request_id: str, prompt: int, new: int, *, arrival: int = 0, priority: int = 0, n: int = 1, beam_width: int = 1
) -> Sequence:
    params = SamplingParams(max_new_tokens=new, n=n, beam_width=beam_width)
    ids = [*TEXT[: prompt - 1], 100 + hash_of(request_id) % 7]
    # The scheduler never looks at an index but to tell answers apart.
    seqs = [
        Sequence(request_id, ids, params, max_seq_len=MAX_LEN, eos_token_ids=(EOS,), index=i, seed=i,
                 key=(priority, arrival or hash_of(request_id)))
        for i in range(n if beam_width == 1 else 1)
    ]  # fmt: skip
    seqs[0].children = seqs[1:]
    if beam_width > 1:
        seqs[0].group = BeamGroup(params, seqs[0])
    return seqs[0]


def hash_of(text: str) -> int:
    return random.Random(text).randrange(10**6)


def make_scheduler(blocks: int = BLOCKS, decode_steps: int = 1, **changes: Any) -> Scheduler:
    return Scheduler(BlockPool(blocks), make_config(**changes), decode_steps)


def next_token(token_ids: list[int], index: int) -> int:
    """A "model" of the tokens and the answer's index alone: often goes on as TEXT does, seldom with EOS."""
    chance = random.Random(f"{index}{token_ids}")
    if chance.random() < 0.03:
        return EOS
    if chance.random() < 0.7:
        return 100 + (token_ids[-1] - 99) % 7
    return 100 + chance.randrange(7)


def alone(prompt: list[int], new: int, index: int) -> list[int]:
    """What an answer must be, whoever else is there."""
    ids = prompt.copy()
    while len(ids) < min(len(prompt) + new, MAX_LEN):
        token = next_token(ids, index)
        if token == EOS:
            break
        ids.append(token)
    return ids[len(prompt) :]


class FakeDevice:
    """Rows and a KV cache: what every slot and row holds, written and read only as a plan says."""

    def __init__(self) -> None:
        self.slots: dict[int, tuple[tuple[int, ...], int]] = {}  # slot → (all tokens up to it, position)
        self.rows: dict[int, dict[int, int]] = {}  # row → position → token
        self.tables: dict[int, dict[int, int]] = {}
        self.draws: dict[int, list[tuple[Sequence, list[int]]]] = {}

    def run(self, plan: StepPlan) -> StepResult:
        for seq in plan.loads:
            if seq.row is not None:
                self.rows[seq.row] = dict(enumerate(seq.token_ids))
                self.tables[seq.row] = dict(enumerate(seq.block_table))
        for seq, place, block in plan.new_blocks:
            if seq.row is not None:
                self.tables[seq.row][place] = block
        for seq, position, token in plan.writes:
            if seq.row is not None:
                self.rows[seq.row][position] = token
        # All sources are read before any target is written: a block may be copied, given back by its last owner, and
        # be somebody's copy, but never the other way round.
        before = self.slots.copy()
        for place, (source, _) in enumerate(plan.copies):
            assert source not in {target for _, target in plan.copies[:place]}, "a copy of a copy"
        for source, target in plan.copies:
            for i in range(BLOCK):
                if source * BLOCK + i in before:
                    self.slots[target * BLOCK + i] = before[source * BLOCK + i]
        result = StepResult([])
        for i in range(plan.entries[0].num_steps if plan.entries else 0):
            self._compute([dataclasses.replace(entry, start=entry.start + i) for entry in plan.entries], result)
        return result

    def _compute(self, entries: list[ScheduledSequence], result: StepResult) -> None:
        written: dict[int, int] = {}
        for entry in entries:
            row = entry.seq.row
            assert row is not None
            for p in range(entry.start, entry.start + entry.num_query_tokens):
                slot = self.tables[row][p // BLOCK] * BLOCK + p % BLOCK
                history = tuple(self.rows[row][q] for q in range(p + 1))
                assert written.setdefault(slot, row) == row, "two rows write into one slot"
                self.slots[slot] = (history, p)
        draw = len(result.tokens)
        for entry in entries:
            for seq in entry.samples:
                assert seq.row is not None
                for j in range(1 + len(entry.drafts)):
                    end = entry.start + entry.num_query_tokens - len(entry.drafts) + j
                    history = [self.rows[seq.row][q] for q in range(end)]
                    for p in range(end):  # the queries see the keys of exactly these tokens
                        slot = self.tables[seq.row][p // BLOCK] * BLOCK + p % BLOCK
                        assert self.slots[slot] == (tuple(history[: p + 1]), p), "the cache holds something else"
                    token = next_token(history, seq.index)
                    if seq.group is not None:
                        result.candidates[len(result.tokens)] = candidates(history)
                    result.tokens.append(token)
        for entry in entries:
            for seq in entry.samples:
                assert seq.row is not None
                for j in range(1 + len(entry.drafts)):
                    end = entry.start + entry.num_query_tokens - len(entry.drafts) + j
                    self.rows[seq.row][end] = result.tokens[draw]
                    draw += 1


def candidates(history: list[int]) -> list[Candidate]:
    chance = random.Random(f"beam{history}")
    tokens = chance.sample([EOS, *range(100, 107)], 6)
    return [Candidate(token, -0.1 - i - chance.random(), 0.0) for i, token in enumerate(tokens)]

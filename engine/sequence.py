"""One stream of tokens as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from tpserve.engine.block_pool import ROOT, BlockHash, block_hash
from tpserve.engine.prompt_lookup import PromptLookup
from tpserve.engine.protocol import PromptLogprob
from tpserve.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tpserve.engine.beam_search import BeamGroup
    from tpserve.engine.guided import Matcher


class Sequence:
    """A prompt and what has been generated after it: one answer, or one beam.

    The first `num_computed_tokens` tokens have their keys and values in the cache, or will have when the steps that
    are under way have run; a step computes some of the rest, and when none is left it samples the next one.
    Preemption only sets the count back: prefill of a new prompt, recomputation and decoding are one rule.

    Attributes:
        request_id, index: the client's name for the request, and which of its answers this is.
        token_ids: prompt and output, as far as the host knows them.
        num_pending: tokens after `token_ids` that the plans under way, at most two, will sample: one each, or
            `ScheduledSequence.num_steps`.
        num_prompt_tokens: how many came with the request.
        num_cached_tokens: prompt tokens that the prefix cache had.
        params: how tokens are chosen; `params.seed` is the request's.
        seed: of this answer.
        max_tokens: length at which it ends: prompt + max_new_tokens, or the context's end.
        block_table: its KV blocks, in order of position.
        block_hashes: of its full blocks, as far as they have been needed.
        num_registered: blocks that have been offered to the prefix cache.
        row: its place in the device's batch state; None while it waits.
        children: answers to the same prompt, which begin when its prefill ends.
        group: its beam search.
        matcher: its grammar's state after `token_ids`.
        lookup: its n-grams, when it is speculated for.
        admitted: it has run before.
        finished: it has ended; what is under way for it counts for nothing.
        said: it has had an output.
        prompt_logprobs: those of the prompt's chunks so far, when they are asked for.
    """

    __slots__ = (
        "admitted", "block_hashes", "block_table", "children", "finished", "group", "index", "key", "lookup", "matcher",
        "max_tokens", "num_cached_tokens", "num_computed_tokens", "num_pending", "num_prompt_tokens",
        "num_registered", "params", "prompt_logprobs", "request_id", "row", "said", "seed", "stop_token_ids",
        "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        max_seq_len: int,
        eos_token_ids: Collection[int],
        output_token_ids: list[int] | None = None,
        index: int = 0,
        seed: int = 0,
        key: tuple[int, int] = (0, 0),
    ) -> None:
        self.request_id, self.index = request_id, index
        self.token_ids = prompt_token_ids + (output_token_ids or [])
        self.num_prompt_tokens = len(prompt_token_ids)
        self.params, self.seed = params, seed
        self.max_tokens = min(self.num_prompt_tokens + params.max_new_tokens, max_seq_len)
        # A grammar's end is EOS: it must count.
        eos = () if params.ignore_eos and params.guided is None else eos_token_ids
        self.stop_token_ids = frozenset((*params.stop_token_ids, *eos))
        self.key = (*key, index)
        self.num_pending = 0
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.block_table: list[int] = []
        self.block_hashes: list[BlockHash] = []
        self.num_registered = 0
        self.row: int | None = None
        self.children: list[Sequence] = []
        self.group: BeamGroup | None = None
        self.matcher: Matcher | None = None
        self.lookup: PromptLookup | None = None
        self.admitted = False
        self.finished = False
        self.said = False
        self.prompt_logprobs: list[PromptLogprob | None] = []

    @property
    def num_tokens(self) -> int:
        """Length so far, with the token that is being sampled."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that must pass through the network before the next one can be sampled; 1 while decoding."""
        return len(self.token_ids) + self.num_pending - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    def extend_hashes(self, block_size: int) -> list[BlockHash]:
        """`block_hashes` of all blocks whose tokens are known."""
        hashes = self.block_hashes
        while (len(hashes) + 1) * block_size <= len(self.token_ids):
            start = len(hashes) * block_size
            parent = hashes[-1] if hashes else ROOT
            hashes.append(block_hash(parent, self.token_ids[start : start + block_size]))
        return hashes

    def fork(self, index: int, seed: int) -> Sequence:
        """Another sequence with the same tokens, computed as far; it owns no block and no row yet."""
        twin = object.__new__(Sequence)
        for name in Sequence.__slots__:
            setattr(twin, name, getattr(self, name))
        twin.index, twin.seed, twin.key = index, seed, (*self.key[:2], index)
        twin.token_ids, twin.block_hashes = self.token_ids.copy(), self.block_hashes.copy()
        twin.block_table, twin.children, twin.row = [], [], None
        twin.matcher = None if self.matcher is None else self.matcher.fork()
        twin.lookup = None  # made anew when it is needed
        twin.said, twin.prompt_logprobs = False, []
        return twin

    def finish_reason_after(self, token_id: int) -> str | None:
        """Why the sequence ends if `token_id` is sampled next; None: it goes on."""
        if token_id in self.stop_token_ids:
            return "stop"
        return "length" if len(self.token_ids) + 1 >= self.max_tokens else None

"""Which tokens the next step computes.

Every step: one token of each decoding sequence first (and drafts for it), then chunks of prompts up to
`max_num_batched_tokens`, so that a long prompt never stalls running streams. A waiting sequence is admitted, in order
of (priority, arrival), when a row is free and the pool has blocks for all its tokens that the prefix cache lacks; it
then owns them, so that only decoding ever asks for more. When decoding finds no free block, the running sequence that
is last in that order gives back its own and waits; later it recomputes what it had (its tokens are kept).

A plan may be made before the tokens of the one before it are known (`num_pending`), unless `must_wait`. Every rank runs
this on the same events and reaches the same plans.
"""

from __future__ import annotations

from tpserve.engine.block_pool import BlockPool
from tpserve.engine.config import EngineConfig
from tpserve.engine.prompt_lookup import PromptLookup
from tpserve.engine.residency import Residency
from tpserve.engine.sequence import Sequence
from tpserve.engine.step import Progress, ScheduledSequence, StepPlan, StepResult

# Rows of logits in a step beside one for each sequence: more would not fit beside the KV cache.
MAX_PROMPT_LOGITS = 512  # of prompt tokens whose log-probabilities are asked for
MAX_DRAFTS = 512


def _is_no_decode(entry: ScheduledSequence) -> bool:
    return entry.num_query_tokens > 1 or len(entry.samples) != 1


class Scheduler:
    """See the module's text.

    Args:
        pool: the KV blocks.
        config: sizes and switches.
        decode_steps: tokens that a sequence which runs alone draws in one plan.

    Attributes:
        prefix_queries, prefix_hits: tokens of admitted prompts, and how many of them the prefix cache had.
        num_draft_tokens, num_accepted_tokens: totals.
    """

    def __init__(self, pool: BlockPool, config: EngineConfig, decode_steps: int = 1) -> None:
        self.residency = Residency(pool, config)
        self.prefix_queries = self.prefix_hits = 0
        self.num_draft_tokens = self.num_accepted_tokens = 0
        self._pool = pool
        self._config = config
        self._decode_steps = decode_steps
        self._plan = StepPlan()  # the next one: what beams decide between steps goes into it

    @property
    def running(self) -> list[Sequence]:
        """Sequences that hold blocks."""
        return self.residency.running

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences that do not."""
        return self.residency.waiting

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self.waiting or self.running)

    @property
    def must_wait(self) -> bool:
        """Whether the next plan needs the tokens of the step under way.

        Beams are chosen and drafts are guessed from them; and a sequence can be preempted only when all its tokens are
        known, which is never asked for while each running one could get a block.
        """
        if self.residency.num_groups or self._config.num_speculative_tokens or not self._config.async_scheduling:
            return True
        return self._pool.num_free < len(self.running)

    def add(self, seq: Sequence) -> None:
        """Queues a sequence; the caller has checked that the whole pool could hold `seq.max_tokens`."""
        self.residency.add(seq)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Drops a request, or one of its answers; unknown ones are ignored."""
        for seq in self.residency.find(request_id):
            if seq.group is not None:
                if index is None:  # a hypothesis has no index before the end
                    self.residency.end_group(seq)
                return
            while not seq.finished and (index is None or seq.index == index):
                self.residency.end(seq)

    def schedule(self) -> StepPlan:
        """Plans a step and takes the blocks it needs; empty while all that runs waits for its last token."""
        plan, self._plan = self._plan, StepPlan()
        preemptions = self.residency.num_preemptions
        self._decode(plan)
        budget = self._config.max_num_batched_tokens - plan.num_tokens
        for seq in self.running.copy():
            if seq.num_uncomputed_tokens > 1 or seq.children:
                budget -= self._prefill(plan, seq, budget)
        if self.residency.num_preemptions == preemptions:  # else what was just taken would be given away again
            # One block more for each running sequence, or it would soon be preempted.
            self._admit(plan, budget, headroom=len(self.running))
        while not plan.entries and self.waiting and not any(seq.num_pending for seq in self.running):
            # All that runs are beams that wait for one that was preempted: the oldest search goes first.
            self._admit(plan, budget, headroom=0)
            if not plan.entries:
                self.residency.preempt_last()
        plan.entries.sort(key=_is_no_decode)
        return plan

    def _decode(self, plan: StepPlan) -> None:
        running = self.running.copy()
        spare = self._config.max_num_batched_tokens - len(running)
        if self.waiting or any(seq.num_uncomputed_tokens > 1 for seq in running):
            spare //= 2  # prompts, too, are to go on
        spare = min(spare, MAX_DRAFTS)
        for i, seq in enumerate(running):
            start, num_tokens = seq.num_computed_tokens, len(seq.token_ids) + seq.num_pending
            if num_tokens - start != 1 or seq.children or num_tokens >= seq.max_tokens:
                continue
            if seq.row is None:  # preempted for one before it, and so are all after it
                break
            drafts = self._guess(seq, -(-spare // (len(running) - i))) if self._config.num_speculative_tokens else []
            steps = self._steps(seq, seq.max_tokens - num_tokens)
            n = self.residency.cover(seq, len(drafts) + steps, plan)
            if n == 0:
                break
            if n == 1:
                drafts, steps = [], 1
            plan.entries.append(ScheduledSequence(seq, start, 1 + len(drafts), (seq,), drafts, steps))
            if drafts:
                spare -= len(drafts)
                plan.writes += [(seq, start + 1 + i, token) for i, token in enumerate(drafts)]
            seq.num_computed_tokens = start + n
            if seq.group is None:
                seq.num_pending += steps

    def _steps(self, seq: Sequence, limit: int) -> int:
        """Tokens to draw in one plan: more than one only where nobody else could want the device in between, and
        nothing but the last token decides about the next."""
        if self._decode_steps == 1 or self._config.num_speculative_tokens or self.waiting or len(self.running) > 1:
            return 1
        return 1 if seq.group is not None or seq.matcher is not None else min(self._decode_steps, limit)

    def _guess(self, seq: Sequence, spare: int) -> list[int]:
        """Drafts for the next tokens, as many as may still count and the grammar allows."""
        # Beams are compared at every token, and a decaying top_p depends on the tokens drawn.
        if seq.group is not None or seq.params.top_p_decay < 1:
            return []
        if seq.lookup is None:
            seq.lookup = PromptLookup(self._config.prompt_lookup_max, self._config.prompt_lookup_min)
        limit = min(self._config.num_speculative_tokens, seq.max_tokens - seq.num_tokens - 1, spare)
        drafts = seq.lookup.propose(seq.token_ids, limit) if limit > 0 else []
        if seq.matcher is not None:
            allowed = 0
            while allowed < len(drafts) and seq.matcher.advance(drafts[allowed]):
                allowed += 1
            seq.matcher.rollback(allowed)
            del drafts[allowed:]
        return drafts

    def _prefill(self, plan: StepPlan, seq: Sequence, budget: int) -> int:
        """Plans the next chunk of a sequence; returns its tokens."""
        n = seq.num_uncomputed_tokens
        asks = seq.params.prompt_logprobs is not None and not seq.said
        if asks:
            n = min(n, MAX_PROMPT_LOGITS - plan.num_prompt_logits)
        if self._config.enable_chunked_prefill:
            n = min(n, budget)
        elif n > budget and any(entry.num_query_tokens > entry.num_draws for entry in plan.entries):
            n = 0  # beside another prompt; drafts are none
        if n <= 0:
            return 0
        plan.num_prompt_logits += n if asks else 0
        start, seq.num_computed_tokens = seq.num_computed_tokens, seq.num_computed_tokens + n
        self.residency.register(seq)
        samples: tuple[Sequence, ...] = ()
        if seq.num_uncomputed_tokens == 0:
            samples = (seq, *seq.children)
            for child in seq.children:  # the other answers begin where the prompt ends
                self.residency.join(child, seq, plan)
            seq.children = []
            for one in samples:
                one.num_pending += one.group is None
        plan.entries.append(ScheduledSequence(seq, start, n, samples, []))
        return n

    def _admit(self, plan: StepPlan, budget: int, headroom: int) -> None:
        """Moves waiting sequences to `running` while there is room for them, and `headroom` blocks are left free."""
        while self.waiting and budget > 0:
            seq = self.waiting[0]
            cached = self.residency.cached_blocks(seq)
            if not self.residency.can_enter(seq, cached, headroom if self.running else 0):
                break
            self.residency.enter(seq, cached, plan)
            if not seq.admitted:
                seq.admitted, seq.num_cached_tokens = True, seq.num_computed_tokens
                self.prefix_queries += seq.num_prompt_tokens
                self.prefix_hits += seq.num_computed_tokens
                plan.scheduled.append(seq.request_id)
            n = self._prefill(plan, seq, budget)
            budget -= n
            headroom += 1
            if n == 0:
                break

    def update(self, plan: StepPlan, result: StepResult) -> list[Progress]:
        """Takes in what the step drew, and ends what is complete; what ended meanwhile is left out."""
        progress: list[Progress] = []
        draw = 0
        for entry in plan.entries:
            for seq in entry.samples:
                first, draw = draw, draw + entry.num_draws
                if seq.finished:
                    continue
                if seq.group is None:
                    done = self._accept(entry, seq, first, result.tokens)
                    progress.append(done)
                    if done.finish_reason is not None:
                        self.residency.end(seq)
                elif seq.group.offer(seq, result.candidates[first]) and not self._branch(seq):
                    progress.append(Progress(seq, [], first, "stop"))
                    self.residency.end_group(seq)
        return progress

    def _accept(self, entry: ScheduledSequence, seq: Sequence, first: int, tokens: list[int]) -> Progress:
        """Appends what was drawn, drafts as long as they agree with it."""
        seq.num_pending -= entry.num_steps
        new: list[int] = []
        reason = error = None
        for i in range(entry.num_draws):
            token = tokens[first + i]
            reason = seq.finish_reason_after(token)
            if reason != "stop":
                if seq.matcher is not None and not seq.matcher.advance(token):
                    reason, error = "error", "bad_words, logit_bias or min_tokens forbid all that the grammar allows"
                    break
                new.append(token)
                seq.token_ids.append(token)
                if seq.matcher is not None and seq.matcher.finished:
                    error = seq.matcher.error
                    reason = "stop" if error is None else "error"
            if reason is not None or (entry.drafts and (i == len(entry.drafts) or token != entry.drafts[i])):
                break
        if entry.drafts:
            self.num_draft_tokens += len(entry.drafts)
            self.num_accepted_tokens += i
            seq.num_computed_tokens = entry.start + len(new)  # what was computed for other drafts does not count
        if seq.num_computed_tokens // self._config.block_size > seq.num_registered:
            self.residency.register(seq)
        return Progress(seq, new, first, reason, error)

    def _branch(self, seq: Sequence) -> bool:
        """Lets the best beams of a search go on; False: it is over."""
        group = seq.group
        assert group is not None
        extensions = group.select()
        if not extensions:
            return False
        parents = {extension.parent for extension in extensions}
        for beam in group.beams:
            if beam not in parents:
                self.residency.end(beam)
        beams = []
        for extension in extensions:
            parent = extension.parent
            if parent in parents:  # its best extension goes on in its place, but only when its twins are made
                parents.remove(parent)
                beams.append(parent)
                continue
            twin = parent.fork(group.next_index, parent.seed)
            group.next_index += 1
            self.residency.join(twin, parent, self._plan)
            beams.append(twin)
        raw = [[*group.logprobs[e.parent], e.candidate.raw_logprob] for e in extensions]
        for beam, extension in zip(beams, extensions, strict=True):
            token = extension.candidate.token_id
            beam.token_ids.append(token)
            if beam.matcher is not None:
                beam.matcher.advance(token)
            self._plan.writes.append((beam, len(beam.token_ids) - 1, token))
            self.residency.register(beam)
        group.beams = {b: e.cumulative_logprob for b, e in zip(beams, extensions, strict=True)}
        group.logprobs = dict(zip(beams, raw, strict=True))
        return True

    def check_integrity(self) -> None:
        """Asserts what must hold between steps."""
        self.residency.check_integrity()

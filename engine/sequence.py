"""One request as the scheduler sees it."""

from __future__ import annotations

from tpserve.engine.sampling_params import SamplingParams


class Sequence:
    """A prompt and what has been generated after it.

    `token_ids` holds both. The first `num_computed_tokens` of them have their keys and values in the cache; a step
    computes some of the rest, and when none is left it samples the next one. Preemption only sets the count back to
    0: prefill of a new prompt, recomputation and decoding are one rule.

    Attributes:
        request_id: the client's name for it.
        token_ids: prompt and output.
        num_prompt_tokens: how many of them came with the request.
        params: how tokens are chosen; `params.seed` is set.
        max_tokens: length at which it ends: prompt + max_new_tokens, or the context's end.
        block_table: its KV blocks, in order of position.
        num_computed_tokens: see above.
    """

    __slots__ = (
        "block_table",
        "max_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "params",
        "request_id",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        max_seq_len: int,
        eos_token_id: int | None,
        output_token_ids: list[int] | None = None,
    ) -> None:
        self.request_id = request_id
        self.token_ids = prompt_token_ids + (output_token_ids or [])
        self.num_prompt_tokens = len(prompt_token_ids)
        self.params = params
        self.max_tokens = min(self.num_prompt_tokens + params.max_new_tokens, max_seq_len)
        eos = () if params.ignore_eos or eos_token_id is None else (eos_token_id,)
        self.stop_token_ids = frozenset((*params.stop_token_ids, *eos))
        self.block_table: list[int] = []
        self.num_computed_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Length so far."""
        return len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that must pass through the network before the next one can be sampled; 1 while decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    def finish_reason_after(self, token_id: int) -> str | None:
        """Why the sequence ends if `token_id` is sampled next; None: it goes on."""
        if token_id in self.stop_token_ids:
            return "stop"
        return "length" if self.num_tokens + 1 >= self.max_tokens else None

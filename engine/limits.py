"""What a request may hold: whatever the model is, and of what a model and its KV cache have room for. Each refusal
gives the field and both numbers. docs/protocols.md has the table for operators; `sampling_params` has the last word on
what the engine takes.
"""

from __future__ import annotations

from collections.abc import Iterable

from tpserve.engine.errors import RequestError
from tpserve.engine.sampling_params import SamplingParams

MAX_JSON_DEPTH = 128  # of a body; a schema in it may be `guided_library.MAX_DEPTH` deep
MAX_PROMPTS = 256  # of one request: encoding them takes time
MAX_MESSAGES = 4096  # of a chat, and text parts of a message: a template takes time for each, whatever is in it
MAX_TOOLS = 128
MAX_STOP, MAX_STOP_CHARS = 16, 256
MAX_STOP_TOKEN_IDS = 64  # and as many top_p_reset_ids
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS = 256, 32


def at_most(name: str, count: int, limit: int, unit: str = "entries", field: str | None = None) -> None:
    """Whether a list, or a text, is as long as it may be.

    Args:
        name: what is told of.
        unit: of both numbers.
        field: of the request, if `name` is only a part of it.

    Raises:
        RequestError: it is longer.
    """
    if count > limit:
        raise RequestError(f"{name} has {count} {unit}, {limit} are admitted", field=field or name)


def check_prompt(token_ids: list[int], max_seq_len: int, vocab_size: int, field: str = "prompt_token_ids") -> None:
    """Whether the context holds a prompt and at least one token.

    Raises:
        RequestError: it is empty, too long, or holds ids that the vocabulary lacks.
    """
    if not token_ids:
        raise RequestError(f"{field} is empty", field=field)
    if len(token_ids) >= max_seq_len:
        raise too_long(field, str(len(token_ids)), max_seq_len)
    worst = min(token_ids) if min(token_ids) < 0 else max(token_ids)
    if not 0 <= worst < vocab_size:
        raise RequestError(f"token id {worst} is outside the vocabulary of {vocab_size}", field=field)


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Whether all ids that the parameters name exist, and beams find enough different tokens.

    Raises:
        RequestError: one does not.
    """
    ids: tuple[tuple[str, Iterable[int]], ...] = (
        ("logit_bias", params.logit_bias),
        ("bad_words", (i for word in params.bad_words for i in word)),
        ("stop_token_ids", params.stop_token_ids),
        ("top_p_reset_ids", params.top_p_reset_ids),
    )
    for field, of_field in ids:
        worst = max(of_field, default=0)
        if worst >= vocab_size:
            raise RequestError(f"{field}: token id {worst} is outside the vocabulary of {vocab_size}", field=field)
    if params.beam_width > 1 and 2 * params.beam_width > vocab_size:
        raise RequestError(
            f"beam_width {params.beam_width} needs a vocabulary of {2 * params.beam_width}, this one has {vocab_size}",
            field="beam_width",
        )


def check_sequences(params: SamplingParams, max_num_seqs: int) -> None:
    """Whether so many sequences may run at once.

    Raises:
        RequestError: they may not.
    """
    field, num_sequences = _sequences(params)
    if num_sequences > max_num_seqs:
        raise RequestError(f"{field} is {num_sequences}; max_num_seqs is {max_num_seqs}", field=field)


def check_room(
    num_prompt_tokens: int, params: SamplingParams, max_seq_len: int, num_blocks: int, block_size: int
) -> None:
    """Whether the KV cache holds the request when nothing else runs; one sequence always fits.

    Raises:
        RequestError: it does not.
    """
    field, num_sequences = _sequences(params)
    longest = min(num_prompt_tokens + params.max_new_tokens, max_seq_len)
    shared = num_prompt_tokens // block_size  # the answers share the prompt's full blocks
    needed = shared + num_sequences * (-(-longest // block_size) - shared)
    if num_sequences > 1 and needed > num_blocks:
        raise RequestError(
            f"{field} {num_sequences} of up to {longest} tokens needs {needed} KV blocks; only {num_blocks} exist",
            field=field,
        )


def too_long(field: str, tokens: str, max_seq_len: int) -> RequestError:
    """The refusal of a prompt that leaves no place for an answer."""
    return RequestError(
        f"{field} has {tokens} tokens; the context holds {max_seq_len}, with at least one to generate", field=field
    )


def _sequences(params: SamplingParams) -> tuple[str, int]:
    """How many sequences the request becomes, and the field that says so."""
    if params.beam_width > 1:
        return "beam_width", params.beam_width
    return "best_of" if (params.best_of or 1) > params.n else "n", params.num_choices

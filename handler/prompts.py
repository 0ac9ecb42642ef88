"""Prompts to token ids, within the model's limits."""

from __future__ import annotations

from typing import cast

from tpserve.engine.errors import RequestError
from tpserve.engine.text.chat import encode_dialog
from tpserve.engine.text.tokenizer import Tokenizer
from tpserve.handler.predictions import Prompt


class PromptEncoder:
    """Encodes prompts and refuses those that the context cannot hold.

    Args:
        tokenizer: None: only token ids are served.
        vocab_size: of the model.
        max_seq_len: tokens of prompt and answer together.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, max_seq_len: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_seq_len = max_seq_len

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt.

        Raises:
            RequestError: names the prompt's field, with the tokens it has and those the context holds.
        """
        if prompt.field == "prompt_token_ids":
            ids = cast(list[int], prompt.value)
            for token_id in ids:
                if token_id >= self._vocab_size:
                    raise RequestError(
                        f"token id {token_id} is outside the vocabulary of {self._vocab_size}", field=prompt.field
                    )
        elif self._tokenizer is None:
            raise RequestError("this model has no tokenizer: send prompt_token_ids instead of text", field=prompt.field)
        elif isinstance(prompt.value, str):
            self._check_chars(prompt.field, len(prompt.value))
            ids = self._tokenizer.encode(prompt.value, bos=True, eos=False)
        else:
            messages = cast(list[tuple[str, str]], prompt.value)
            self._check_chars(prompt.field, sum(len(content.strip()) for _, content in messages))
            ids = encode_dialog(self._tokenizer, messages)
        if len(ids) >= self._max_seq_len:
            raise self._too_long(prompt.field, str(len(ids)))
        return ids

    def _check_chars(self, field: str, num_chars: int) -> None:
        # Encoding megabytes takes seconds, during which every other stream would stand still.
        assert self._tokenizer is not None
        at_least = num_chars // self._tokenizer.max_piece_chars
        if at_least >= self._max_seq_len:
            raise self._too_long(field, f"at least {at_least}")

    def _too_long(self, field: str, tokens: str) -> RequestError:
        return RequestError(
            f"{field} has {tokens} tokens; the context holds {self._max_seq_len}, with at least one to generate",
            field=field,
        )

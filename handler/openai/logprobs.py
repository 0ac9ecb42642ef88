"""Log-probabilities in OpenAI's two forms, and vLLM's of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpserve.engine.answer import Delta
from tpserve.engine.protocol import PromptLogprob, TopLogprobs
from tpserve.engine.text.detokenizer import IncrementalDetokenizer
from tpserve.engine.text.tokenizer import NO_PIECE, PieceKind, Tokenizer

_LOWEST = -9999.0  # OpenAI's, for what JSON cannot say


def finite(logprob: float) -> float:
    """As JSON can say it."""
    return max(logprob, _LOWEST)


class TokenTexts:
    """What tokens are called.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pieces = tokenizer.pieces
        self._control = tokenizer.controls
        self._strips_first_space = tokenizer.strips_first_space

    def text(self, token_id: int, first: bool = False) -> str:
        """A token's text; `first`: where decoding drops a space. Bytes that are no characters are "bytes:\\xe6"."""
        kind, text, data = self._pieces[token_id] if token_id < len(self._pieces) else NO_PIECE
        if kind is PieceKind.BYTES:
            return data.decode() if data.isascii() else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        if kind is PieceKind.INVISIBLE:
            return self._control.get(token_id, f"<token {token_id}>")
        return text.removeprefix(" ") if first and self._strips_first_space else text

    def bytes(self, token_id: int, first: bool = False) -> list[int] | None:
        """Its UTF-8; None: it has no text."""
        kind, _, data = self._pieces[token_id] if token_id < len(self._pieces) else NO_PIECE
        if kind is PieceKind.INVISIBLE:
            return None
        return list(data) if kind is PieceKind.BYTES else list(self.text(token_id, first).encode())


def chat_logprobs(texts: TokenTexts, delta: Delta, at_start: bool) -> list[dict[str, Any]]:
    """Of an answer's new tokens; `at_start`: they are its first, whose leading space is not told."""
    out: list[dict[str, Any]] = []
    for i, (token_id, logprob) in enumerate(zip(delta.ids, delta.logprobs or [], strict=True)):
        first = at_start and i == 0
        tops = delta.top_logprobs[i] if delta.top_logprobs else []
        of_tops = [_token(texts, top, value, first) for top, value in tops]
        out.append(_token(texts, token_id, logprob, first) | {"top_logprobs": of_tops})
    return out


def prompt_logprobs(
    texts: TokenTexts, ids: Sequence[int], scored: Sequence[PromptLogprob | None], num_tops: int
) -> list[dict[str, Any] | None]:
    """vLLM's form: token id → what it is, for each token of the prompt and the most probable ones in its place."""
    return [
        None
        if one is None
        else {
            str(token_id): {"logprob": finite(logprob), "decoded_token": texts.text(token_id)}
            for token_id, logprob in [*one.top[:num_tops], (chosen, one.logprob)]
        }
        for chosen, one in zip(ids, scored, strict=True)
    ]


class CompletionLogprobs:
    """One choice's, in the completions API's form.

    Args:
        texts: of the model's tokens.
        tokenizer: of the model.
        prompt_ids: what the choice's text goes on from; with `echo` it is part of it.
        continues: the text goes on from the prompt's.
    """

    def __init__(
        self, texts: TokenTexts, tokenizer: Tokenizer, prompt_ids: Sequence[int], echo: bool, continues: bool
    ) -> None:
        self._texts = texts
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._continues = continues
        self._offset = 0
        if continues and not echo:
            self._detokenizer.push(prompt_ids)

    def prompt(self, scored: Sequence[PromptLogprob | None], num_tops: int, text: str) -> dict[str, Any]:
        """Of the prompt's tokens, which stand first; without scores they have none.

        Args:
            scored: one a token, if they are known.
            num_tops: so many most probable tokens each.
            text: of the prompt, as it stands in the choice's.
        """
        ids = self._prompt_ids
        known = scored or [None] * len(ids)
        out = self._list(
            ids,
            [None if one is None else one.logprob for one in known],
            [None if one is None else one.top[:num_tops] for one in known],
        )
        self._offset = len(text)  # which may hold spaces that its tokens do not
        if not self._continues:
            self._detokenizer = IncrementalDetokenizer(self._tokenizer)
        return out

    def said(self, delta: Delta) -> dict[str, Any]:
        """Of an answer's new tokens."""
        logprobs = delta.logprobs or []
        return self._list(delta.ids, logprobs, delta.top_logprobs or [[] for _ in delta.ids])

    def _list(
        self, ids: Sequence[int], logprobs: Sequence[float | None], tops: Sequence[TopLogprobs | None]
    ) -> dict[str, Any]:
        offsets, named = [], []
        for token_id, logprob, top in zip(ids, logprobs, tops, strict=True):
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.push([token_id]))
            named.append(None if logprob is None else self._tops(token_id, logprob, top or []))
        return {
            "tokens": [self._texts.text(token_id) for token_id in ids],
            "token_logprobs": [None if logprob is None else finite(logprob) for logprob in logprobs],
            "top_logprobs": named,
            "text_offset": offsets,
        }

    def _tops(self, token_id: int, logprob: float, top: TopLogprobs) -> dict[str, float]:
        """Most probable first; of two tokens with the same text the more probable one counts."""
        named: dict[str, float] = {}
        for other, value in [*top, (token_id, logprob)]:
            named.setdefault(self._texts.text(other), finite(value))
        return named


def joined(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Two of the completions API's forms, one after the other."""
    return {key: first[key] + second[key] for key in first}


def _token(texts: TokenTexts, token_id: int, logprob: float, first: bool) -> dict[str, Any]:
    token = {"token": texts.text(token_id, first), "logprob": finite(logprob)}
    return token | {"bytes": texts.bytes(token_id, first)}

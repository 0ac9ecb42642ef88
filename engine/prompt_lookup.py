"""Guessing what comes next from what was said before (Saxena, "Prompt Lookup Decoding", 2023).

Text repeats itself: where the last few tokens stood before, what followed them then is a good guess for now. A guess
costs nothing but its place in the step; the engine keeps it only where it is what would have been sampled.
"""

from __future__ import annotations


class PromptLookup:
    """An index of one sequence's n-grams that grows with it: constant work a token, whatever its length.

    Args:
        longest, shortest: lengths of the n-grams that are looked up, in this order.
    """

    def __init__(self, longest: int, shortest: int) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        # n-gram → where it ended the last time, and the time before: the last one may be the end of the text itself.
        self._ends: dict[tuple[int, ...], tuple[int, int]] = {}
        self._indexed = 0

    def propose(self, token_ids: list[int], limit: int) -> list[int]:
        """At most `limit` tokens that may follow.

        Args:
            token_ids: the sequence; what earlier calls saw must be its beginning.
            limit: see above.
        """
        for end in range(self._indexed + 1, len(token_ids) + 1):
            for n in self._lengths:
                if n <= end:
                    gram = tuple(token_ids[end - n : end])
                    self._ends[gram] = (end, self._ends.get(gram, (-1, -1))[0])
        self._indexed = len(token_ids)
        for n in self._lengths:
            _, before = self._ends.get(tuple(token_ids[-n:]), (-1, -1))
            if before >= n:
                return token_ids[before : before + limit]
        return []

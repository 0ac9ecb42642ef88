"""Stop strings in a text that arrives in pieces: Aho and Corasick's automaton (1975), a constant cost a character."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque


@dataclasses.dataclass(slots=True)
class _Node:
    """The longest suffix of the text so far that is a prefix of a stop string."""

    depth: int  # its length
    next: dict[str, _Node] = dataclasses.field(default_factory=dict)
    shorter: _Node | None = None  # the next shorter such suffix; None at the root
    match: int = 0  # length of the longest stop string that ends here


@functools.lru_cache(maxsize=256)
def _automaton(stops: tuple[str, ...]) -> _Node:
    """The root; shared between requests, for it is never changed again."""
    root = _Node(0)
    for stop in stops:
        node = root
        for char in stop:
            node = node.next.setdefault(char, _Node(node.depth + 1))
        node.match = len(stop)
    queue = deque([root])
    while queue:  # breadth first: shorter suffixes are known before longer ones
        node = queue.popleft()
        for char, child in node.next.items():
            child.shorter = _step(node.shorter, char, root) if node.shorter else root
            child.match = child.match or child.shorter.match
            queue.append(child)
    return root


def _step(node: _Node | None, char: str, root: _Node) -> _Node:
    while node is not None:
        found = node.next.get(char)
        if found is not None:
            return found
        node = node.shorter
    return root


class StopMatcher:
    """Looks for the match that ends first; of those that end with the same character, the longest.

    Args:
        stops: not empty, and none of them is.

    Attributes:
        num_chars: how many have been looked at.
        cut: where the match starts, once there is one.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._root = self._node = _automaton(stops)
        self._first = frozenset(stop[0] for stop in stops)
        self.num_chars = 0
        self.cut: int | None = None

    @property
    def num_safe_chars(self) -> int:
        """So much of the text cannot become part of a match."""
        return self.num_chars - self._node.depth if self.cut is None else self.cut

    def push(self, text: str, counts: bool = True) -> bool:
        """Looks at more text; whether there is a match. Not to be called after one.

        Args:
            text: what comes next.
            counts: a match that ends in it is one.
        """
        node, root, first = self._node, self._root, self._first
        if node is root and first.isdisjoint(text):
            self.num_chars += len(text)
            return False
        for i, char in enumerate(text, start=1):
            node = _step(node, char, root)
            if node.match and counts:
                self.num_chars += i
                self.cut = self.num_chars - node.match
                return True
        self._node = node
        self.num_chars += len(text)
        return False

"""TorchServe's side of the mailbox, and what its clients see."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.handler.fakes import FakeContext, tokenizer
from tpserve.handler.mailbox import Mailbox

HELLO = {"prompt": "once upon a time"}
KNOWN = ({}, {"url_path": ""})  # TorchServe sends a payload once


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text, bos=False, eos=False)


class Frontend:
    """Calls the mailbox; keeps what each id was told, like a client would see it."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self.open: list[str] = []
        self.bodies: dict[str, bytes] = {}
        self.status: dict[str, int] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.chunked: set[str] = set()

    def call(self, new: Mapping[str, tuple[Any, Any]] | None = None) -> FakeContext:
        new = new or {}
        ids = [*self.open, *new]
        pairs = [new.get(request_id, KNOWN) for request_id in ids]
        context = FakeContext(ids, [headers for _, headers in pairs])
        results = self.mailbox.handle([data for data, _ in pairs], context)
        assert len(results) == len(ids)
        self.open = ids
        assert context.stopping_criteria is not None
        for index, request_id in context.request_ids.items():
            end = context.stopping_criteria[index](results[index])
            if request_id not in self.bodies:
                # Without "more to come" on its first chunk a stream's client would hang for ever.
                assert end is not True
                self.status[request_id] = context.status.get(index, (200, ""))[0]
                self.headers[request_id] = context.headers[index]
            else:
                assert end is not None, "a stream cannot turn into a whole reply"
                assert index not in context.status, "the status went out with the first chunk"
            if end is False:
                self.chunked.add(request_id)
            else:
                self.open.remove(request_id)
            self.bodies[request_id] = self.bodies.get(request_id, b"") + results[index]
        return context

    def lines(self, request_id: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.bodies[request_id].splitlines()]

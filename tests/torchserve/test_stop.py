"""`tpserve torchserve --stop`. Last in this folder: the session's server does not come back."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

from tests.torchserve.server import Server, encoded
from tpserve.engine.process import is_running
from tpserve.handler.torchserve_command import stop

LONG = {"prompt": "once upon a time", "max_new_tokens": 240, "ignore_eos": True, "n": 8}


def test_what_runs_may_end_and_what_is_new_is_refused(server: Server) -> None:
    assert server.get("1.0/health/ready").status == server.get("1.0/health/live").status == 200
    assert (server.get("1.0/v2/health/ready").status, server.get("1.0/v2/health/live").status) == (200, 200)
    pids = server.process.pids
    with ThreadPoolExecutor() as pool, server.request("POST", "", encoded(LONG), "application/json") as response:
        lines = [json.loads(response.readline())]
        stopped = pool.submit(stop, pids[0], 60.0)
        while (health := server.get("1.0/health/ready")).status == 200:
            time.sleep(0.01)
        assert health.json == {"status": "draining", "reason": "the server is shutting down"}
        assert server.get("1.0/health/live").status == 200
        refused = server.post(LONG)
        lines += [json.loads(line) for line in response]
        assert not stopped.result()
    assert (refused.status, refused.json["error"]["message"]) == (503, "the server is shutting down")
    assert [line["finish_reason"] for line in lines if "finish_reason" in line] == ["length"] * 8
    assert sum(len(line["ids"]) for line in lines) == 8 * 240
    assert not [pid for pid in pids if is_running(pid)]

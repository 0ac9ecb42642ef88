"""`python -m tests.faults.soak --minutes 30 --clients 16 --front serve`: clients stream while ranks die and hang.

As soon as the server serves again, the next fault comes: a third of them at the first token, a third when every client
has had one, a third when a standby group waits as well. Every answer is compared with what the same request got before
the first fault. A machine that is too busy for so many faults in the time goes on until there were enough. Exit status
1: a request was lost or got other tokens, or something was left over.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.faults.fronts import NAMES, Front, demo, start
from tests.faults.processes import num_fds, rss_mib
from tests.faults.streams import Clients, requests, undisturbed
from tests.faults.strikes import KINDS, Outcome, readiness, strike, until
from tests.faults.tables import quantile, table, write

_WEIGHTS = (6, 6, 3, 3, 3, 2, 1, 1)  # of KINDS
_WAIT_S = 30.0


def soak(front: Front, minutes: float, num_faults: int, num_clients: int, seed: int) -> dict[str, Any]:
    """Figures; the server is ready."""
    rng = random.Random(seed)
    bodies = requests(36)
    expected = undisturbed(front, bodies, num_clients)
    assert expected == undisturbed(front, bodies, 5), "answers differ without any fault"
    until(lambda: front.standby, "a group that waits")
    before = _counts(front)
    _say(f"undisturbed: {len(bodies)} answers, twice the same; {before}")
    outcomes: list[Outcome] = []
    trouble: list[str] = []
    told = 0
    clients = Clients(front, bodies, expected, num_clients)
    began_s = time.monotonic()
    ends_s = began_s + 60 * minutes
    with readiness(front) as asking:
        while time.monotonic() < ends_s or len(outcomes) < num_faults:
            back_s = time.monotonic()
            match rng.randrange(3):
                case 0:
                    time.sleep(rng.random())
                case 1:
                    _wait(lambda: min(clients.heard_s) > back_s)  # noqa: B023
                case 2:
                    _wait(lambda: front.standby)
            (kind,) = rng.choices(KINDS, _WEIGHTS)
            try:
                outcomes.append(strike(front, kind, asking, lambda: clients.last_token_s))
            except AssertionError as e:
                trouble.append(f"{time.strftime('%H:%M:%S')} {e}")
                _say(trouble[-1])
                break
            one = outcomes[-1]
            _say(
                f"{len(outcomes)}: {kind}, {'warm' if one.warm else 'cold'}: denied {_s(one.unready_s)}, granted "
                f"{_s(one.ready_s)}, token {_s(one.token_s)}; {clients.completions} right, {len(clients.wrong)} wrong"
            )
            for line in clients.wrong[told:]:
                _say(line)
            told = len(clients.wrong)
    took_s = time.monotonic() - began_s
    hanging = clients.stop()
    trouble += [f"{hanging} clients hang"] * bool(hanging)
    with contextlib.suppress(AssertionError):
        until(lambda: front.ready() and front.standby and set(front.blocks_in_use()) == {0}, "idleness", 60)
    blocks, after = front.blocks_in_use(), _counts(front)
    trouble += [f"{one.kind}: left {one.left}" for one in outcomes if one.left]
    trouble += [f"blocks in use: {blocks}"] * any(blocks)
    trouble += [
        f"{name}: {before[name]}, then {after[name]}"
        for name in ("processes", "folders")
        if before[name] != after[name]
    ]
    return {
        "front": front.name,
        "minutes": round(took_s / 60, 1),
        "clients": num_clients,
        "faults": len(outcomes),
        "completions, all as undisturbed": clients.completions,
        "tokens": clients.tokens,
        "lost or different": clients.wrong,
        "trouble": trouble,
        "blocks left": sum(blocks),
        "before": before,
        "after": after,
        "rows": _rows(outcomes),
    }


def _wait(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + _WAIT_S
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.1)


def _counts(front: Front) -> dict[str, float]:
    """What must be the same before and after; the memory and the descriptors of the front's own process."""
    places = {group.folder for group in front.groups}
    parents = {place.parent for place in places}
    folders = sum(entry.name.startswith("tpserve-") for parent in parents for entry in parent.iterdir())
    return {"processes": len(front.processes), "folders": folders, "front_fds": num_fds(front.owner),
            "front_rss_mib": round(rss_mib(front.owner))}  # fmt: skip


def _rows(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    by_kind: dict[tuple[str, bool], list[Outcome]] = collections.defaultdict(list)
    for one in outcomes:
        by_kind[one.kind, one.warm].append(one)
    rows = []
    for kind in KINDS:
        for warm in (True, False):
            found = by_kind.get((kind, warm), [])
            times = {"token": [one.token_s for one in found], "unready": [one.unready_s for one in found]}
            known = {name: [s for s in seconds if s is not None] for name, seconds in times.items()}
            if found:
                denied_s, token_s = known["unready"], known["token"]
                points = (("p50", 0.5), ("p90", 0.9), ("max", 1.0))
                rows.append(
                    {"kind": kind, "standby": warm, "count": len(found), "denied": len(denied_s)}
                    | {"denied_max_s": _round(max(denied_s, default=math.nan))}
                    | {f"token_{name}_s": _round(quantile(token_s, q)) for name, q in points}
                )
    return rows


def markdown(figures: dict[str, Any]) -> str:
    """The table for docs/faults.md."""
    head = ("fault", "standby waits", "times", "not ready after, max", "next token p50", "p90", "max")
    rows = [
        (row["kind"], "yes" if row["standby"] else "no", row["count"], _s(row["denied_max_s"]),
         *(_s(row[f"token_{name}_s"]) for name in ("p50", "p90", "max")))
        for row in figures["rows"]
    ]  # fmt: skip
    return table(head, rows)


def _round(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(seconds, 2)


def _s(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"


def _say(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--faults", type=int, help="at least; default: 100 in 30 minutes")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--front", choices=NAMES, default="serve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", help="where the server's log is copied to")
    arguments = parser.parse_args()
    if arguments.faults is None:
        arguments.faults = int(arguments.minutes * 100 / 30)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended
    with demo() as checkpoint:
        front = start(arguments.front, checkpoint)
        try:
            front.wait_until_ready(180)
            figures = soak(front, arguments.minutes, arguments.faults, arguments.clients, arguments.seed)
        finally:
            if arguments.log:
                shutil.copy(front.log, arguments.log)
            left = front.stop()
    figures["processes left"] = len(left)
    name = "soak" if arguments.front == "serve" else f"soak-{arguments.front}"
    path = write(name, "tests.faults.soak", figures)
    shown = {name: value for name, value in figures.items() if name != "rows"}
    _say(f"{json.dumps(shown, indent=1)}\n\n{markdown(figures)}\n\n{path}")
    return bool(figures["lost or different"] or figures["trouble"] or left)


if __name__ == "__main__":
    sys.exit(main())

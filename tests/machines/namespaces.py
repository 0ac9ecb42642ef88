"""Machines that are network namespaces of this one: addresses of their own, joined by a pair of virtual cables."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator

ADDRESSES = ("10.213.0.1", "10.213.0.2")
_INTERFACE = "tps0"
_CLONE_NEWNET = 0x40000000  # linux/sched.h


def missing() -> str | None:
    """Why this machine cannot do it; None: it can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    probe = f"tps-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False)
    if made.returncode:
        return "this machine makes no network namespaces"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


@contextlib.contextmanager
def two_machines() -> Iterator[list[list[str]]]:
    """Two namespaces that see each other at `ADDRESSES`; yields what to put before a command to run it in each."""
    names = [f"tps-{os.getpid()}-{i}" for i in range(2)]
    ends = [f"tps{os.getpid() % 100000}{side}" for side in "ab"]
    with contextlib.ExitStack() as undo:
        for name in names:
            _ip("netns", "add", name)
            undo.callback(_ip, "netns", "delete", name)
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            _ip("link", "set", end, "netns", name)
            _ip("-n", name, "link", "set", end, "name", _INTERFACE)
            _ip("-n", name, "address", "add", f"{address}/24", "dev", _INTERFACE)
            for link in (_INTERFACE, "lo"):
                _ip("-n", name, "link", "set", link, "up")
        yield [["ip", "netns", "exec", name] for name in names]


@contextlib.contextmanager
def inside(machine: list[str]) -> Iterator[None]:
    """What this thread connects meanwhile, it connects on one of the machines."""
    with open("/proc/thread-self/ns/net", "rb") as here, open(f"/run/netns/{machine[-1]}", "rb") as there:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(here.fileno())


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def cable(machine: list[str], state: str) -> None:
    """Plugs a machine's cable in ("up") or out ("down")."""
    _ip("-n", machine[-1], "link", "set", _INTERFACE, state)


def environment() -> dict[str, str]:
    """Of a process on one of the machines."""
    return os.environ | {"GLOO_SOCKET_IFNAME": _INTERFACE, "OMP_NUM_THREADS": "1"}


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)

"""Messages between the client and rank 0, over a Unix socket that both read and write themselves.

ZeroMQ has a thread at either end that must be woken first: a message of 600 bytes took 127 µs to a process that had
just been heard, and 328 µs to one that had slept for 0.15 s; so it takes 24 and 104 (medians of 40, two CPU cores).
Whoever asks for one token waits for two.

What the other end has no room for is kept, and sent by whatever is called next: nobody waits for the other one, who may
be in a step, or stopped.

A frame is its length, and what is in it: each message's length, and the message; lengths are 32 bits, little-endian.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path

_LENGTH = struct.Struct("<I")
_AT_ONCE = 1 << 20  # bytes
_NAME = "client"  # of the socket in a group's folder


def listener(folder: Path) -> socket.socket:
    """The client's end, until rank 0 has connected.

    Raises:
        OSError: the path is too long for a socket, or there is one.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(str(folder / _NAME))
        made.listen(1)
        made.setblocking(False)
    except BaseException:
        made.close()
        raise
    return made


class MessageStream:
    """One end.

    Args:
        connected: the socket; it is this object's from now on.

    Attributes:
        ended: the other end is closed, and everything that it said was received.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket, self.ended = connected, False
        self._received = bytearray()
        self._unsent = bytearray()
        self._lock = threading.Lock()  # of what is unsent: one thread may send while another one receives
        self._unheard = False  # nobody reads any more; what was said may still be there

    @classmethod
    def connect(cls, folder: Path) -> MessageStream:
        """Rank 0's end.

        Raises:
            OSError: nobody listens.
        """
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.connect(str(folder / _NAME))
        except BaseException:
            made.close()
            raise
        return cls(made)

    def fileno(self) -> int:
        """To wait for."""
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether `flush` has something to do as soon as there is room."""
        return bool(self._unsent)

    def send(self, messages: Sequence[bytes]) -> None:
        """Sends messages that arrive together; never waits. They are lost if the other end is closed."""
        body = b"".join(part for message in messages for part in (_LENGTH.pack(len(message)), message))
        with self._lock:
            self._unsent += _LENGTH.pack(len(body)) + body
            self._flush()

    def flush(self) -> None:
        """Sends what there is room for."""
        with self._lock:
            self._flush()

    def flush_all(self, timeout_s: float) -> None:
        """Waits until everything is sent, at most so long."""
        deadline_s = time.monotonic() + timeout_s
        while self.has_unsent and (wait_s := deadline_s - time.monotonic()) > 0:
            select.select([], [self], [], wait_s)
            self.flush()

    def _flush(self) -> None:
        try:
            while self._unsent and not self._unheard:
                del self._unsent[: self._socket.send(self._unsent[:_AT_ONCE])]
        except BlockingIOError:
            return
        except OSError:  # closed
            self._unheard = True
        self._unsent.clear()

    def receive(self) -> list[bytes]:
        """Every message that has arrived; never waits."""
        if not self.ended:
            self._read()
        messages: list[bytes] = []
        at, received = 0, self._received
        while len(received) >= at + _LENGTH.size:
            end = at + _LENGTH.size + _LENGTH.unpack_from(received, at)[0]
            if end > len(received):
                break
            at += _LENGTH.size
            while at < end:
                first = at + _LENGTH.size
                at = first + _LENGTH.unpack_from(received, at)[0]
                messages.append(bytes(received[first:at]))
        del received[:at]
        return messages

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                while data := self._socket.recv(_AT_ONCE):
                    self._received += data
            except ConnectionResetError:
                pass
            self.ended = True

    def wait(self, timeout_s: float) -> None:
        """Until something has arrived, at most so long; sends meanwhile."""
        deadline_s = time.monotonic() + timeout_s
        while (wait_s := deadline_s - time.monotonic()) > 0:
            if self.ended:
                time.sleep(wait_s)
                return
            poll = select.poll()
            poll.register(self, select.POLLIN | (select.POLLOUT if self.has_unsent else 0))
            events = poll.poll(1000 * wait_s)
            self.flush()
            if any(event & ~select.POLLOUT for _, event in events):
                return

    def close(self) -> None:
        """Drops what is unsent."""
        self._socket.close()


class ClientEnd:
    """The client's: also before rank 0 has connected.

    Args:
        folder: the group's.

    Attributes:
        poll: of everything that `wait` waits for; who has other descriptors registers them.

    Raises:
        OSError: see `listener`.
    """

    def __init__(self, folder: Path) -> None:
        self._listener = listener(folder)
        self._stream: MessageStream | None = None
        self._early: list[Sequence[bytes]] = []
        self._closed = False
        self._lock = threading.Lock()
        self._woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # there is something that did not find room
        self.poll = select.poll()
        self.poll.register(self._listener, select.POLLIN)
        self.poll.register(self._woken, select.POLLIN)

    def send(self, messages: Sequence[bytes]) -> None:
        """See `MessageStream`; may be called while another thread waits or receives."""
        with self._lock:
            if self._closed:
                return
            if self._stream is None:
                self._early.append(messages)
                return
            self._stream.send(messages)
            if self._stream.has_unsent:
                os.eventfd_write(self._woken, 1)

    def wait(self, timeout_s: float) -> tuple[bool, list[int]]:
        """Whether something may have arrived, and which of the others' descriptors have; waits at most so long."""
        stream = self._stream
        if stream is not None and not stream.ended:
            self.poll.modify(stream, select.POLLIN | (select.POLLOUT if stream.has_unsent else 0))
        heard, others = False, []
        for fd, event in self.poll.poll(max(1, int(1000 * timeout_s))):
            if fd == self._listener.fileno():
                self._accept()
            elif fd == self._woken:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._woken)
            elif stream is not None and fd == stream.fileno():
                stream.flush()
                heard = heard or bool(event & ~select.POLLOUT)
            else:
                others.append(fd)
        return heard, others

    def receive(self) -> list[bytes]:
        """Every message that has arrived; never waits."""
        if self._stream is None:
            self._accept()
        stream = self._stream
        if stream is None:
            return []
        ended = stream.ended
        messages = stream.receive()
        if stream.ended and not ended:
            self.poll.unregister(stream)
        return messages

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            connected, _ = self._listener.accept()
            with self._lock:
                self._stream = MessageStream(connected)
                self.poll.register(self._stream, select.POLLIN)
                self.poll.unregister(self._listener)
                for messages in self._early:
                    self._stream.send(messages)
                self._early.clear()

    def close(self) -> None:
        """Drops what is unsent; what is sent later is lost."""
        with self._lock:
            self._closed = True
            self._listener.close()
            if self._stream is not None:
                self._stream.close()
            os.close(self._woken)

"""The head's end of its connections to the agents of other machines."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError
from tpserve.engine.node_protocol import (
    MAX_BYTES,
    PING_S,
    SILENCE_S,
    Ended,
    HeadWord,
    Hello,
    NodeKeys,
    NodeWord,
    Ping,
    Refused,
    versions,
)

_HERE_S = 1.0  # who was heard so lately is there

logger = logging.getLogger(__name__)


class Node:
    """One connection of one agent: an agent that comes back is another node.

    Attributes:
        name: of its machine.
        lost: why there is no connection any more; None while there is.
        ended: what the agent has said of parts of groups, by the group.
    """

    def __init__(self, name: str, routing_id: bytes) -> None:
        self.name, self.routing_id = name, routing_id
        self.lost: str | None = None
        self.ended: dict[str, Ended] = {}
        self.heard_s = time.monotonic()


class NodeHub:
    """Waits for agents, from its making to `close`. Thread-safe; a thread of its own has the socket.

    Args:
        config: says where, and with which key.

    Attributes:
        refusal: why nobody can ever be waited for.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.refusal: str | None = None
        self._lock = threading.Lock()
        self._nodes: dict[bytes, Node] = {}
        self._orders: queue.SimpleQueue[tuple[Node, HeadWord] | threading.Event] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[NodeWord] = msgspec.msgpack.Decoder(NodeWord)
        self._bell, self._rung = socket.socketpair()
        for end in (self._bell, self._rung):
            end.setblocking(False)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._thread = threading.Thread(target=self._run, name="tpserve-nodes", daemon=True)
        self._cleanup = contextlib.ExitStack()
        self._cleanup.callback(self._context.destroy, linger=0)
        try:
            self._open(config)
            self._thread.start()
        except ConfigError as e:
            self.refusal = str(e)
        except (OSError, zmq.ZMQError) as e:
            self.refusal = f"node_address {config.node_address}, node_port {config.node_port}: {e}"

    def _open(self, config: EngineConfig) -> None:
        keys = NodeKeys.load(config.node_key_file)
        host = socket.gethostbyname(config.node_address)
        # Before a socket is bound: without somebody to ask, ZeroMQ lets in whoever knows the head's public key.
        authenticator = ThreadAuthenticator(self._context)
        logging.getLogger("zmq.auth").setLevel(logging.WARNING)  # otherwise two lines a connection
        authenticator.start()
        self._cleanup.callback(authenticator.stop)
        authenticator.configure_curve_callback("*", _Only(keys.node_public))
        self._socket = self._context.socket(zmq.ROUTER)
        self._cleanup.callback(self._socket.close)
        for name, value in {
            "linger": 0, "router_mandatory": 1, "maxmsgsize": MAX_BYTES, "sndhwm": 0, "rcvhwm": 0,
            "curve_server": True, "curve_secretkey": keys.head_secret,
        }.items():  # fmt: skip
            setattr(self._socket, name, value)
        self._socket.bind(f"tcp://{host}:{config.node_port}")

    @property
    def nodes(self) -> list[Node]:
        """Those that are connected, in the order of their coming."""
        with self._lock:
            return [node for node in self._nodes.values() if node.lost is None]

    def say(self, node: Node, word: HeadWord) -> None:
        """Sends a word, if the node is there; words to one node arrive in order."""
        self._orders.put((node, word))
        self._ring()

    def flush(self, timeout_s: float = 1.0) -> None:
        """Waits until everything has been sent, or found to have nobody to be sent to."""
        done = threading.Event()
        self._orders.put(done)
        self._ring()
        done.wait(timeout_s)

    def close(self) -> None:
        """Ends all connections: the agents kill what they have launched."""
        self._closing.set()
        self._ring()
        if self._thread.is_alive():
            self._thread.join()
        self._cleanup.close()
        self._bell.close()
        self._rung.close()

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it rings already
            self._bell.send(b"!")

    # What follows runs in the hub's thread.

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._rung, zmq.POLLIN)
        pinged_s = 0.0
        while not self._closing.is_set():
            try:
                poller.poll(int(PING_S * 1000))
                with contextlib.suppress(BlockingIOError):
                    self._rung.recv(4096)
                self._listen()
                self._send_orders()
                if time.monotonic() - pinged_s >= PING_S:
                    pinged_s = time.monotonic()
                    self._look(pinged_s)
            except Exception:  # whoever serves goes on
                logger.exception("the connections to other machines")
                time.sleep(PING_S)

    def _listen(self) -> None:
        while self._socket.poll(0):
            routing_id, *rest = self._socket.recv_multipart()
            try:
                word = self._decoder.decode(b"".join(rest))
            except msgspec.MsgspecError as e:
                logger.warning("a word from another machine cannot be read: %s", e)
                continue
            node = self._nodes.get(routing_id)
            if isinstance(word, Hello):
                self._welcome(word, routing_id)
            elif node is not None:
                node.heard_s = time.monotonic()
                if isinstance(word, Ended):
                    node.ended[word.group] = word

    def _welcome(self, hello: Hello, routing_id: bytes) -> None:
        node = Node(hello.name, routing_id)
        reason = None
        if hello.versions != versions():
            reason = f"it has {hello.versions}, the head {versions()}"
        for other in self.nodes:
            if other.name != hello.name:
                continue
            self._send(other, Ping())  # notices that its connection is closed
            if other.lost is None and time.monotonic() - other.heard_s < _HERE_S:
                reason = "another one has its name (--name)"
            elif other.lost is None:  # half of a connection is left: it came back
                self._lose(other, "it came back")
        if reason is not None:
            logger.error("machine %s is not wanted: %s", hello.name, reason)
            self._send(node, Refused(reason))
            return
        logger.info("machine %s is here", hello.name)
        with self._lock:
            self._nodes[routing_id] = node

    def _send_orders(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                order = self._orders.get_nowait()
                if isinstance(order, threading.Event):
                    order.set()
                else:
                    self._send(*order)

    def _look(self, now_s: float) -> None:
        for node in self.nodes:
            if now_s - node.heard_s > SILENCE_S:
                self._lose(node, f"it was silent for {SILENCE_S:g} s")
            else:
                self._send(node, Ping())

    def _send(self, node: Node, word: HeadWord) -> None:
        if node.lost is not None:
            return
        try:
            self._socket.send_multipart([node.routing_id, self._encoder.encode(word)], zmq.NOBLOCK)
        except zmq.ZMQError as e:  # EHOSTUNREACH: the connection is closed
            self._lose(node, "the connection is closed" if e.errno == zmq.EHOSTUNREACH else str(e))

    def _lose(self, node: Node, reason: str) -> None:
        logger.warning("machine %s is lost: %s", node.name, reason)
        node.lost = reason
        with self._lock:
            self._nodes.pop(node.routing_id, None)


class _Only:
    """Lets in who has one key; ZeroMQ has made sure that he has its secret."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, _domain: str, key: bytes) -> bool:
        return key == self._public

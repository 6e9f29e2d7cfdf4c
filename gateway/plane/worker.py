"""The life of a connection, and the process it happens in.

    accept -> gate open:   connect -> relay
           -> gate closed: park, wake; when it opens: connect -> relay

Clients that send datagrams are served beside, by `gateway.plane.datagram`, before the same gates.

Counterpart: `gateway.workers` in the control plane starts this process and gives the orders, over the link. A worker knows
of each backend only whether its gate is open, and where it is dialled. It starts nothing and decides nothing about
sleep. A warm connection never talks to the control plane.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import socket
import sys
import traceback
from socket import SocketType as Socket
from typing import Any, ClassVar

from backends.endpoint import AddressError, parse
from gateway.plane import link as say
from gateway.plane.datagram import DatagramListener
from gateway.plane.dial import TRIES, dial, target
from gateway.plane.gate import Client, Gate, Settling
from gateway.plane.link import Link, LinkClosed
from gateway.plane.listener import Listener
from gateway.plane.loop import Loop
from gateway.plane.relay import join

MOST_DIALS = 64
"""Connects under way to one backend. Where more are needed it does not keep up: the others stay parked, and cost nothing."""

TALLIES_IN_A_MESSAGE = 1000


class Worker:
    def __init__(self, sock: socket.socket) -> None:
        self.loop = Loop()
        self.loop.on_error = self.broken
        self.link = Link(sock)
        self.gates: dict[int, Gate] = {}
        self.listeners: dict[int, Listener | DatagramListener] = {}
        self.settling = Settling(self.loop, self.settled)
        self.letting_in = False

    # A connection

    def admit(self, client: Client) -> None:
        """A listener accepted a client."""
        gate = client.gate
        if gate.endpoints is None or gate.parked or gate.dialling >= MOST_DIALS:
            gate.park(client)
        else:
            self.connect(client)

    def connect(self, client: Client) -> None:
        """The gate is open: dial the backend."""
        gate = client.gate
        assert gate.endpoints is not None
        if gate.connections >= gate.limits.connections:
            gate.turn_away(client, "limits.connections")
            return
        where = gate.endpoints.get(client.listener) or gate.endpoints.get("")
        if where is None or not where.stream:
            gate.turn_away(client, f"endpoints: none for listener {client.listener!r}")
            return
        gate.enter()
        client.tries += 1
        dial(self.loop, client, where, self.dialled)

    def dialled(self, client: Client, upstream: Socket | None, why: str) -> None:
        """The backend took the connection, or did not."""
        gate = client.gate
        if upstream is not None:
            join(self.loop, client.sock, upstream, gate, client.registered)
        else:
            gate.leave()
            self.not_taken(client, why)
        if gate.parked:
            self.let_in(gate)

    def not_taken(self, client: Client, why: str) -> None:
        """It died a moment ago, perhaps. The client must not pay for that: it waits while the control plane looks."""
        gate = client.gate
        if client.tries >= TRIES:
            gate.turn_away(client, why)
            return
        if gate.endpoints is not None:
            gate.close()
            self.tell(say.Refused(gate.number, why))
        gate.park(client)

    def let_in(self, gate: Gate) -> None:
        """Connect the parked clients, first come first, as fast as the backend takes them."""
        if self.letting_in:
            return
        self.letting_in = True
        while gate.parked and gate.endpoints is not None and gate.dialling < MOST_DIALS:
            self.connect(gate.unpark())
        self.letting_in = False

    # Orders

    def serve(self, order: say.Serve, fds: list[int]) -> None:
        gate = self.gates.get(order.backend)
        if gate is None:
            self.gates[order.backend] = Gate(self.loop, order, self.tell, self.settling)
        else:
            gate.limits = order

    def listen(self, order: say.Listen, fds: list[int]) -> None:
        sock, gate = socket.socket(fileno=fds.pop(0)), self.gates[order.backend]
        if sock.type == socket.SOCK_DGRAM:
            self.listeners[order.listener] = DatagramListener(self.loop, sock, gate, order.name)
        else:
            self.listeners[order.listener] = Listener(self.loop, sock, gate, order.name, self.admit, self.trouble)

    def unlisten(self, order: say.Unlisten, fds: list[int]) -> None:
        listener = self.listeners.pop(order.listener, None)
        if listener is not None:
            listener.close(order.accept_waiting)

    def open(self, order: say.Open, fds: list[int]) -> None:
        gate = self.gates[order.backend]
        try:
            endpoints = {name: target(parse(address)) for name, address in order.endpoints.items()}
        except (AddressError, ValueError) as error:
            self.trouble(f"{gate.limits.name}: {error}")
            gate.reject()
            return
        gate.open(endpoints)
        self.let_in(gate)

    def close(self, order: say.Close, fds: list[int]) -> None:
        gate = self.gates[order.backend]
        gate.close()
        self.tell(say.Closed(gate.number, gate.connections))

    def reject(self, order: say.Reject, fds: list[int]) -> None:
        self.gates[order.backend].reject()

    def cut(self, order: say.Cut, fds: list[int]) -> None:
        if gate := self.gates.get(order.backend):
            gate.cut()

    def forget(self, order: say.Forget, fds: list[int]) -> None:
        if gate := self.gates.get(order.backend):
            gate.forgotten = True
            self.drop_forgotten(gate)

    def count(self, order: say.Count, fds: list[int]) -> None:
        tallies = [gate.tally() for gate in self.gates.values() if gate.used]
        while len(tallies) > TALLIES_IN_A_MESSAGE:
            self.tell(say.Counted(order.serial, tallies[:TALLIES_IN_A_MESSAGE], more=True))
            del tallies[:TALLIES_IN_A_MESSAGE]
        self.tell(say.Counted(order.serial, tallies))

    def quit(self, order: say.Quit, fds: list[int]) -> None:
        self.loop.stop()

    ORDERS: ClassVar[dict[type[Any], Any]] = {
        say.Serve: serve,
        say.Listen: listen,
        say.Unlisten: unlisten,
        say.Open: open,
        say.Close: close,
        say.Reject: reject,
        say.Cut: cut,
        say.Forget: forget,
        say.Count: count,
        say.Quit: quit,
    }

    # Quiet gates

    def settled(self, gate: Gate) -> None:
        gate.say_quiet()
        self.drop_forgotten(gate)

    def drop_forgotten(self, gate: Gate) -> None:
        if gate.forgotten and not gate.connections:
            gate.reject()
            self.settling.discard(gate)
            self.gates.pop(gate.number, None)

    # The process

    def tell(self, message: say.Message) -> None:
        """Say something to the control plane; it is sent when the socket takes it, this never waits."""
        try:
            self.link.send(message)
        except LinkClosed:
            self.loop.stop()
            return
        if self.link.pending:
            self.loop.modify(self.link.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def trouble(self, text: str) -> None:
        self.tell(say.Trouble(text))

    def broken(self, source: object, error: BaseException) -> None:
        self.trouble(f"unexpected error in {type(source).__name__}: {error!r}")
        traceback.print_exception(error)

    def event(self, mask: int) -> None:
        """The link is readable or writable."""
        try:
            if mask & select.EPOLLOUT:
                self.link.flush()
                if not self.link.pending:
                    self.loop.modify(self.link.fileno(), select.EPOLLIN)
            while (datagram := self.link.receive()) is not None:
                messages, fds = datagram
                for message in messages:
                    self.ORDERS[type(message)](self, message, fds)
        except LinkClosed:
            self.loop.stop()

    def run(self) -> None:
        """Work until the control plane says Quit or is gone."""
        self.loop.add(self.link.fileno(), self, select.EPOLLIN)
        self.tell(say.Hello(say.VERSION, os.getpid()))
        self.loop.run()
        self.loop.close()
        self.link.close()


def main() -> None:
    """The process: `python -m gateway.plane FD`, with its link at that descriptor."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the control plane ends it, also when a terminal signals the whole group
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    worker = Worker(socket.socket(fileno=int(sys.argv[1])))
    gc.collect()
    gc.freeze()
    worker.run()

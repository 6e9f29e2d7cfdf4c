"""The life of a connection, and the process it happens in.

    accept -> gate open:   a turn of the loop later: hear, connect -> relay
           -> gate closed: park, wake; when it opens: hear, connect -> relay

Clients that send datagrams are served beside, by `gateway.plane.datagram`, before the same gates.

Counterpart: `gateway.workers` in the control plane starts this process and gives the orders, over the link. A worker knows
of each backend only whether its gate is open, and where it is dialled. It starts nothing and decides nothing about
sleep. A warm connection never talks to the control plane; without one, open gates stay open and clients of closed ones
wait, until the next control plane comes (`gateway.plane.rendezvous`) or patience ends.
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
from collections.abc import Iterable, Sequence
from functools import partial
from socket import SocketType as Socket
from typing import Any, ClassVar

from backends.endpoint import parse
from gateway.plane import link as say
from gateway.plane.datagram import DatagramListener
from gateway.plane.dial import TRIES, Failure, Target, dial, own_ports, target
from gateway.plane.gate import Client, Gate, Settling, live_by_gate
from gateway.plane.link import Link, LinkClosed
from gateway.plane.listener import Listener, Room
from gateway.plane.loop import Loop, Timer
from gateway.plane.relay import hear, join
from gateway.plane.rendezvous import Rendezvous

MOST_DIALS = 64
"""Connects under way to one backend. Where more are needed it does not keep up: the others stay parked, and cost nothing."""

TALLIES_IN_A_MESSAGE = 1000

TROUBLE_GAP = 1.0
"""Seconds between two reports of the same trouble."""


class Worker:
    """`orphan_time`: seconds that it goes on without a control plane. It is found at its rendezvous then: a listening
    socket, and its path. -1: it cannot be found."""

    def __init__(self, sock: socket.socket, rendezvous: int, path: str, orphan_time: float) -> None:
        self.loop = Loop()
        self.loop.on_error = self.broken
        self.link: Link | None = None
        self.orphan_time = orphan_time
        self.patience: Timer | None = None
        self.granted = 0.0
        """at least so many seconds"""
        self.retiring = False
        self.gates: dict[int, Gate] = {}
        self.listeners: dict[int, Listener | DatagramListener] = {}
        self.settling = Settling(self.loop, self.settled)
        self.room = Room(self.loop, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self.letting_in = False
        self.troubles: dict[str, float] = {}
        """what was said a moment ago, and when"""
        self.rendezvous = Rendezvous(self.loop, rendezvous, path, self.met) if rendezvous >= 0 else None
        own_ports()
        self.linked(sock)

    # A connection

    def admit(self, client: Client) -> None:
        """A listener accepted a client. It is dialled a turn of the loop later: by then many have said what they want."""
        gate = client.gate
        if self.must_wait(gate):
            gate.park(client)
        elif self.enter(client):
            self.loop.soon(partial(self.begin, client))

    @staticmethod
    def must_wait(gate: Gate) -> bool:
        """Whether a client has to be parked."""
        return gate.endpoints is None or bool(gate.parked) or len(gate.dials) >= MOST_DIALS

    def begin(self, client: Client) -> None:
        """A client that was let in may have to wait after all."""
        gate = client.gate
        if self.must_wait(gate):
            gate.leave()
            gate.park(client)
        else:
            self.connect(client)

    def enter(self, client: Client) -> bool:
        """Count a client in, or turn it away."""
        gate = client.gate
        if gate.connections >= gate.limits.connections:
            gate.turn_away(client, "limits.connections")
            return False
        gate.enter()
        return True

    def connect(self, client: Client) -> None:
        """The gate is open: dial the backend. The client is counted already."""
        gate = client.gate
        where = gate.leads_to(client.listener)
        if where is None or not where.stream:
            gate.leave()
            gate.turn_away(client, f"endpoints: none for listener {client.listener!r}")
            return
        if not client.said:
            said = hear(client.sock)
            if said is None:
                gate.leave()
                self.loop.discard(client.sock)
                return
            client.said = said
        if not client.tries:
            gate.total += 1
        client.tries += 1
        client.dialled_under = gate.endpoints
        dial(self.loop, client, where, self.dialled)

    def dialled(self, client: Client, upstream: Socket | None, failure: Failure | None) -> None:
        """The backend took the connection, or did not."""
        gate = client.gate
        if upstream is not None:
            join(self.loop, client.sock, upstream, gate, client.said, client.taken)
        elif failure is not None:
            gate.leave()
            self.not_taken(client, failure)
        if gate.parked:
            self.let_in(gate)

    def not_taken(self, client: Client, failure: Failure) -> None:
        """It died a moment ago, perhaps. The client must not pay for that: it waits while the control plane looks.

        A backend that does not keep up is not dead. And a dial that began before the gate was opened anew tells nothing
        of what is there since then.
        """
        gate = client.gate
        if client.tries >= TRIES or not failure.gone:
            gate.turn_away(client, failure.why)
            return
        if gate.endpoints is not None and gate.endpoints is client.dialled_under:
            gate.close()
            self.tell(say.Refused(gate.number, failure.why))
        gate.park(client)

    def let_in(self, gate: Gate) -> None:
        """Connect the parked clients, first come first, as fast as the backend takes them."""
        if self.letting_in:
            return
        self.letting_in = True
        try:
            while gate.parked and gate.endpoints is not None and len(gate.dials) < MOST_DIALS:
                client = gate.unpark()
                if self.enter(client):
                    self.connect(client)
        finally:
            self.letting_in = False

    # Orders

    def serve(self, order: say.Serve, fds: list[int]) -> None:
        gate = self.gates.get(order.backend)
        if gate is None:
            self.gates[order.backend] = Gate(self.loop, order, self.tell, self.settling)
        else:
            gate.forgotten = False
            gate.limit(order)

    def listen(self, order: say.Listen, fds: list[int]) -> None:
        sock = socket.socket(fileno=fds.pop(0))
        if order.listener in self.listeners:
            sock.close()
            return
        gate = self.gates[order.backend]
        if sock.type == socket.SOCK_DGRAM:
            self.listeners[order.listener] = DatagramListener(self.loop, sock, gate, order)
        else:
            self.listeners[order.listener] = Listener(self.loop, sock, gate, order, self.room, self.admit, self.trouble)

    def unlisten(self, order: say.Unlisten, fds: list[int]) -> None:
        listener = self.listeners.pop(order.listener, None)
        if listener is not None:
            listener.close(order.accept_waiting)

    def open(self, order: say.Open, fds: list[int]) -> None:
        gate = self.gates.get(order.backend)
        if gate is None:  # it came when this worker was retiring already
            return
        endpoints: dict[str, Target | None] = {}
        for name, address in order.endpoints.items():
            # One that is no good is left out: its clients are turned away by that name, and do not wait for ever.
            try:
                endpoints[name] = target(parse(address))
            except (OSError, ValueError) as error:
                endpoints[name] = None
                self.trouble(f"{gate.limits.name}: {address}: {error}")
        gate.open(endpoints, order.endpoints)
        self.let_in(gate)

    def close(self, order: say.Close, fds: list[int]) -> None:
        gate = self.gates.get(order.backend)
        if gate is not None:
            gate.close()
            gate.call()  # they waited for their turn, and nobody might come after them
            if gate.connections:
                gate.tell_busy()
        self.tell(say.Closed(order.serial, gate.connections if gate else 0))

    def reject(self, order: say.Reject, fds: list[int]) -> None:
        if gate := self.gates.get(order.backend):
            gate.reject()

    def move(self, order: say.Move, fds: list[int]) -> None:
        gate, heir = self.gates.get(order.backend), self.gates.get(order.heir)
        if gate is None or heir is None or gate is heir:
            return
        while gate.parked:
            client = gate.unpark()
            client.move(heir)
            self.admit(client)
        for door in gate.doors:
            door.move(heir)
        gate.emptied()

    def cut(self, order: say.Cut, fds: list[int]) -> None:
        if gate := self.gates.get(order.backend):
            gate.cut()

    def forget(self, order: say.Forget, fds: list[int]) -> None:
        if gate := self.gates.get(order.backend):
            gate.forgotten = True
            self.drop_forgotten(gate)

    def count(self, order: say.Count, fds: list[int]) -> None:
        live = live_by_gate(self.loop)
        tallies = [gate.tally(live.get(gate, ())) for gate in self.gates.values() if gate.used]
        while len(tallies) > TALLIES_IN_A_MESSAGE:
            self.tell(say.Counted(order.serial, tallies[:TALLIES_IN_A_MESSAGE], more=True))
            del tallies[:TALLIES_IN_A_MESSAGE]
        self.tell(say.Counted(order.serial, tallies))

    def tell_all(self, order: say.Tell, fds: list[int]) -> None:
        """For a control plane that did not see how all this began."""
        gates = list(self.gates.values())
        self.send_all(gate.serving() for gate in gates)
        self.tell_held()
        self.tell(say.Told(self.retiring))
        for gate in gates:
            gate.tell_again()

    def tell_held(self) -> None:
        listeners = list(self.listeners.values())
        self.send_all((listener.held for listener in listeners), [listener.sock.fileno() for listener in listeners])

    def retire(self, order: say.Retire, fds: list[int]) -> None:
        """Somebody else accepts from now on."""
        self.retiring = True
        if order.sockets:
            self.tell_held()
        for listener in self.listeners.values():
            listener.close(accept_waiting=False)
        self.listeners.clear()
        self.tell(say.Retired())
        self.loop.later(order.drain, self.end)
        self.end_if_done()

    def end_if_done(self) -> None:
        if self.retiring and not any(gate.connections or gate.awaited for gate in self.gates.values()):
            self.end()

    def end(self) -> None:
        """The last word are the counters: what was served must not be lost with the worker."""
        self.count(say.Count(0), [])
        self.loop.stop()

    def be_patient(self, order: say.Patience, fds: list[int]) -> None:
        self.granted = order.seconds

    def quit(self, order: say.Quit, fds: list[int]) -> None:
        self.loop.stop()

    ORDERS: ClassVar[dict[type[Any], Any]] = {
        say.Serve: serve,
        say.Listen: listen,
        say.Unlisten: unlisten,
        say.Open: open,
        say.Close: close,
        say.Reject: reject,
        say.Move: move,
        say.Cut: cut,
        say.Forget: forget,
        say.Count: count,
        say.Tell: tell_all,
        say.Retire: retire,
        say.Patience: be_patient,
        say.Quit: quit,
    }

    # Quiet gates

    def settled(self, gate: Gate) -> None:
        gate.say_quiet()
        self.drop_forgotten(gate)
        self.end_if_done()

    def drop_forgotten(self, gate: Gate) -> None:
        if gate.forgotten and not gate.connections:
            gate.reject()
            self.settling.discard(gate)
            self.gates.pop(gate.number, None)

    # The link

    def linked(self, sock: socket.socket) -> None:
        """There is a control plane."""
        if self.patience is not None:
            self.patience.cancel()
        self.granted = 0.0
        self.link = Link(sock)
        self.loop.add(self.link.fileno(), self, select.EPOLLIN)
        self.tell(say.Hello(say.VERSION, os.getpid()))

    def met(self, sock: socket.socket) -> None:
        """Somebody came to the rendezvous."""
        if self.link is not None:
            self.event(0)  # the end of the old link may be in the same batch of events
        if self.link is None:
            self.linked(sock)
        else:
            sock.close()

    def orphaned(self) -> None:
        """The control plane is gone without a word."""
        assert self.link is not None
        self.loop.remove(self.link.fileno())
        self.link.close()
        self.link = None
        if self.rendezvous is None:
            self.loop.stop()
        elif not self.retiring:
            self.patience = self.loop.later(max(self.orphan_time, self.granted), self.loop.stop)

    def tell(self, message: say.Message) -> None:
        """Say something to the control plane; it is sent when the socket takes it, this never waits.

        Without one it is not said: the next one asks for everything.
        """
        self.send_all((message,))

    def send_all(self, messages: Iterable[say.Message], fds: Sequence[int] = ()) -> None:
        if self.link is None:
            return
        try:
            self.link.send_all(messages, fds)
        except LinkClosed:
            return  # the reader sees it, too, and takes what is still there to be read
        if self.link.pending:
            self.loop.modify(self.link.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def trouble(self, text: str) -> None:
        """Say it to people, who do not want to read the same again at once."""
        now = self.loop.now()
        self.troubles = {text: when for text, when in self.troubles.items() if now - when < TROUBLE_GAP}
        if text not in self.troubles:
            self.troubles[text] = now
            self.tell(say.Trouble(text))

    def broken(self, source: object, error: BaseException) -> None:
        self.trouble(f"unexpected error in {type(source).__name__}: {error!r}")
        traceback.print_exception(error)

    def event(self, mask: int) -> None:
        """The link is readable or writable."""
        try:
            if mask & select.EPOLLOUT and self.link is not None:
                self.link.flush()
                if not self.link.pending:
                    self.loop.modify(self.link.fileno(), select.EPOLLIN)
            while self.link is not None and (datagram := self.link.receive()) is not None:
                messages, fds = datagram
                for message in messages:
                    self.ORDERS[type(message)](self, message, fds)
        except LinkClosed:
            self.orphaned()

    # The process

    def run(self) -> None:
        """Work until the control plane says Quit, or is gone for too long."""
        self.loop.run()
        if self.rendezvous is not None:
            self.rendezvous.close()
        self.loop.close()
        if self.link is not None:
            self.link.close()


def main() -> None:
    """The process: `python -m gateway.plane LINK RENDEZVOUS DIRECTORY ORPHAN_TIME`; the first two are descriptors."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the control plane ends it, also when a terminal signals the whole group
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    link, rendezvous, directory, orphan_time = sys.argv[1:]
    path = os.path.join(directory, f"{os.getpid()}.sock")
    worker = Worker(socket.socket(fileno=int(link)), int(rendezvous), path, float(orphan_time))
    gc.collect()
    gc.freeze()
    worker.run()

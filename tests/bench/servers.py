"""Backends that no Debian package offers. Standard library only: `python -I -S servers.py KIND PORT-OR-PATH`.

sink    reads `U` or `D` and a length of 8 bytes, then takes or gives as many bytes; a thread for each stream
echo    sends back what it gets; any number of connections
udp     sends each datagram back to its sender
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading

BLOCK = 256 << 10


def command(kind: str, where: int | str) -> list[str]:
    """The command line of one of them."""
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), kind, str(where)]


def listen(where: str) -> socket.socket:
    if where.isdigit():
        return socket.create_server(("127.0.0.1", int(where)), backlog=4096)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(where)
    sock.listen(4096)
    return sock


def sink(where: str) -> None:
    with listen(where) as server:
        while True:
            client = server.accept()[0]
            threading.Thread(target=_stream, args=(client,), daemon=True).start()


def _stream(sock: socket.socket) -> None:
    with sock:
        head = sock.recv(9, socket.MSG_WAITALL)
        if len(head) < 9:
            return
        left, block = int.from_bytes(head[1:], "big"), memoryview(bytearray(BLOCK))
        while left > 0:
            moved = sock.recv_into(block) if head[:1] == b"U" else sock.send(block[:left])
            if not moved:
                return
            left -= moved
        if head[:1] == b"U":
            sock.send(b".")  # it has arrived


def echo(where: str) -> None:
    epoll = select.epoll()
    clients: dict[int, socket.socket] = {}
    with listen(where) as server:
        epoll.register(server, select.EPOLLIN)
        while True:
            for fd, _ in epoll.poll():
                if fd == server.fileno():
                    client = server.accept()[0]
                    clients[client.fileno()] = client
                    epoll.register(client, select.EPOLLIN)
                    continue
                try:
                    data = clients[fd].recv(4096)
                    clients[fd].sendall(data)
                except OSError:
                    data = b""
                if not data:
                    clients.pop(fd).close()


def udp(where: str) -> None:
    buffer = bytearray(65536)
    view = memoryview(buffer)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", int(where)))
        while True:
            try:
                size, sender = sock.recvfrom_into(buffer)
                sock.sendto(view[:size], sender)
            except ConnectionRefusedError:
                continue  # a client that is gone; only connected sockets hear of it, but be sure


if __name__ == "__main__":
    {"sink": sink, "echo": echo, "udp": udp}[sys.argv[1]](sys.argv[2])

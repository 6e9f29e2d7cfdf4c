"""The one misbehaving program: the payload of processes, containers, machines and guests in the tests.

It needs the standard library only and is one file, so that it can be copied anywhere. Without options it waits for a
signal. What it serves, unless told otherwise: greets each stream connection with `hello PID`, then echoes; a datagram
is sent back. Tests build its command line with `command`, which also spares what slows Python's start.

    --listen ADDRESS     tcp://HOST:PORT, unix:PATH, unix:@NAME, udp://HOST:PORT, unixgram:PATH; repeatable
    --inherit            serve the sockets of LISTEN_FDS
    --stdio              serve one connection on stdin and stdout, end with it
    --after SECONDS      listen that much later
    --never-ready        never listen
    --say TEXT           a line on stdout at the start; repeatable. --say-error TEXT: on stderr
    --started FILE       append the own PID to a file at the start
    --notify             sd_notify READY=1 once it listens. --notify-on-signal: at SIGUSR1 instead
    --status TEXT        sd_notify STATUS=TEXT at the start
    --http STATUS        answer each request with this status and `hello PID`, then close
    --half-close         be silent until the client's end of file, then say `hello PID` and all it sent
    --die-on-connect     end at the first connection, before answering it
    --exit-after SECONDS end by itself
    --exit-code NUMBER   how it ends by itself
    --ignore-term        ignore SIGTERM
    --fork               have a child of the same group that would outlive it; says `child PID`
    --daemonize-child    have a grandchild in its own session, with other outputs; says `daemon PID`
    --forget-environment clear the environment of those children
    --fd-report          say which descriptors are open, and LISTEN_*, as `fds 0,1,2 FDS PID-IS-MINE NAMES`
    --report             say user, groups, umask, directory, limits and signals, one `key=value` a line
    --environment NAME   say `NAME=value`; repeatable
"""

import os
import select
import signal
import socket
import sys
import time

FLAGS = {
    "inherit", "stdio", "never-ready", "notify", "notify-on-signal", "half-close", "die-on-connect", "ignore-term",
    "fork", "daemonize-child", "forget-environment", "fd-report", "report",
}  # fmt: skip
VALUES = {"after": float, "exit-after": float, "exit-code": int, "http": int, "started": str, "status": str}
REPEATABLE = {"listen", "say", "say-error", "environment"}


def command(*arguments: object) -> list[str]:
    """The command line that runs this program with these arguments."""
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), *map(str, arguments)]


def parse(words):
    """argparse would double the time to start."""
    options = dict.fromkeys(FLAGS, False) | dict.fromkeys(VALUES) | {name: [] for name in REPEATABLE}
    words = iter(words)
    for word in words:
        name = word.removeprefix("--")
        if name in FLAGS:
            options[name] = True
        elif name in VALUES:
            options[name] = VALUES[name](next(words))
        elif name in REPEATABLE:
            options[name].append(next(words))
        else:
            sys.exit(f"mimic: unknown option {word}")
    return options


def say(text, stream=1):
    os.write(stream, text.encode() + b"\n")


def listen(address):
    scheme, _, rest = address.partition(":")
    kind = socket.SOCK_STREAM if scheme in ("tcp", "unix") else socket.SOCK_DGRAM
    if scheme in ("tcp", "udp"):
        host, _, port = rest.removeprefix("//").rpartition(":")
        host = host.strip("[]")
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, int(port)))
    elif scheme in ("unix", "unixgram"):
        sock = socket.socket(socket.AF_UNIX, kind)
        if not rest.startswith("@") and os.path.exists(rest):
            os.unlink(rest)
        sock.bind("\0" + rest[1:] if rest.startswith("@") else rest)
    else:
        sys.exit(f"mimic: cannot listen on {address}")
    if kind == socket.SOCK_STREAM:
        sock.listen(4096)
    return sock


def notify(text):
    path = os.environ["NOTIFY_SOCKET"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("\0" + path[1:] if path.startswith("@") else path)
        sock.send(text.encode())


def report_fds():
    fds = []
    for fd in range(1024):
        try:
            os.fstat(fd)
            fds.append(fd)
        except OSError:
            pass
    mine = os.environ.get("LISTEN_PID") == str(os.getpid())
    say(f"fds {','.join(map(str, fds))} {os.environ.get('LISTEN_FDS')} {mine} {os.environ.get('LISTEN_FDNAMES')}")


def report():
    import resource

    old = os.umask(0)
    os.umask(old)
    with open("/proc/self/status") as status:
        masks = dict(line.rstrip("\n").split(":\t", 1) for line in status if line.startswith(("SigBlk", "SigIgn")))
    facts = {
        "uid": os.getuid(),
        "gid": os.getgid(),
        "groups": ",".join(map(str, sorted(os.getgroups()))),
        "umask": f"{old:04o}",
        "cwd": os.getcwd(),
        "nofile": "{}:{}".format(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        "core": "{}:{}".format(*resource.getrlimit(resource.RLIMIT_CORE)),
        "session": os.getsid(0) == os.getpid() == os.getpgid(0),
        "blocked": masks["SigBlk"],
        "ignored": masks["SigIgn"],
        "blocking": ",".join(str(os.get_blocking(fd)) for fd in range(3)),
    }
    for key, value in facts.items():
        say(f"{key}={value}")


def have_children(options):
    """Descendants that stay: each ignores SIGTERM and waits for ever."""
    for name, word in (("fork", "child"), ("daemonize-child", "daemon")):
        if not options[name]:
            continue
        reader, writer = os.pipe()
        middle = os.fork()
        if middle == 0:
            if name == "daemonize-child":
                os.setsid()
                if os.fork():
                    os._exit(0)
                null = os.open("/dev/null", os.O_RDWR)
                for fd in range(3):
                    os.dup2(null, fd)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if options["forget-environment"]:
                os.set_inheritable(writer, True)
                code = f"import os, signal; os.write({writer}, b'%d' % os.getpid()); os.close({writer}); signal.pause()"
                os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", code], {})
            os.write(writer, b"%d" % os.getpid())
            os.close(writer)
            os.close(reader)
            while True:
                signal.pause()
        os.close(writer)
        if name == "daemonize-child":
            os.waitpid(middle, 0)
        say(f"{word} {os.read(reader, 32).decode()}")
        os.close(reader)


class Server:
    """One loop for all connections, so that a slow client holds up nobody."""

    def __init__(self, options, sockets):
        self.options = options
        self.listening = {sock.fileno(): sock for sock in sockets}
        self.clients = {}  # fd -> (socket, what was received)
        self.poll = select.poll()
        for sock in sockets:
            sock.setblocking(False)
            self.poll.register(sock, select.POLLIN)

    def run(self, end):
        while end is None or time.monotonic() < end:
            left = None if end is None else max(0, end - time.monotonic()) * 1000
            for fd, _ in self.poll.poll(left):
                try:
                    if fd in self.listening:
                        self.take(self.listening[fd])
                    else:
                        self.answer(fd)
                except BlockingIOError:
                    pass
                except OSError:
                    self.drop(fd)

    def take(self, sock):
        if sock.type == socket.SOCK_DGRAM:
            data, sender = sock.recvfrom(65536)
            sock.sendto(data, sender)
            return
        client, _ = sock.accept()
        if self.options["die-on-connect"]:
            os._exit(self.options["exit-code"] or 0)
        if not (self.options["half-close"] or self.options["http"]):
            client.sendall(b"hello %d\n" % os.getpid())
        self.clients[client.fileno()] = (client, bytearray())
        self.poll.register(client, select.POLLIN)

    def answer(self, fd):
        client, received = self.clients[fd]
        data = client.recv(65536)
        received += data
        if self.options["http"]:
            if b"\r\n\r\n" in received:
                body = b"hello %d\n" % os.getpid()
                head = (
                    f"HTTP/1.1 {self.options['http']} Mimic\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                )
                client.sendall(head.encode() + body)
                self.drop(fd)
            elif not data:
                self.drop(fd)
        elif self.options["half-close"]:
            if not data:
                client.sendall(b"hello %d\n" % os.getpid() + bytes(received))
                self.drop(fd)
        else:
            received.clear()
            if data:
                client.sendall(data)
            else:
                self.drop(fd)

    def drop(self, fd):
        if fd in self.clients:
            self.poll.unregister(fd)
            self.clients.pop(fd)[0].close()


def serve_stdio(options):
    if options["half-close"]:
        received = bytearray()
        while data := os.read(0, 65536):
            received += data
        os.write(1, b"hello %d\n" % os.getpid() + received)
        return
    say(f"hello {os.getpid()}")
    while data := os.read(0, 65536):
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]


def main():
    options = parse(sys.argv[1:])
    begun = time.monotonic()
    if options["ignore-term"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options["notify-on-signal"]:
        signal.signal(signal.SIGUSR1, lambda *_: notify("READY=1"))
    if options["started"]:
        with open(options["started"], "a") as file:
            file.write(f"{os.getpid()}\n")
    if options["status"] is not None:
        notify(f"STATUS={options['status']}")
    for text in options["say"]:
        say(text)
    for text in options["say-error"]:
        say(text, 2)
    for name in options["environment"]:
        say(f"{name}={os.environ.get(name)}")
    if options["fd-report"]:
        report_fds()
    if options["report"]:
        report()
    have_children(options)
    if options["stdio"]:
        serve_stdio(options)
        sys.exit(options["exit-code"] or 0)
    end = None if options["exit-after"] is None else begun + options["exit-after"]
    sockets = []
    if options["inherit"]:
        if os.environ.get("LISTEN_PID") != str(os.getpid()):
            sys.exit("mimic: LISTEN_PID is not mine")
        sockets += [socket.socket(fileno=3 + index) for index in range(int(os.environ["LISTEN_FDS"]))]
    if options["after"]:
        time.sleep(options["after"])
    if not options["never-ready"]:
        sockets += [listen(address) for address in options["listen"]]
    if options["notify"]:
        notify("READY=1")
    Server(options, sockets).run(end)
    sys.exit(options["exit-code"] or 0)


if __name__ == "__main__":
    main()

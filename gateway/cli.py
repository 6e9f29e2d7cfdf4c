"""The command `dormant`: run a gateway, check a configuration, and talk to a gateway that runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from backends.units import Duration
from gateway import __version__, config, logs

T = TypeVar("T")

DEFAULT_CONFIGS = ("dormant.yaml", "/etc/dormant/dormant.yaml")


class DurationType(click.ParamType[Duration]):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Duration:
        try:
            return Duration.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dormant")
def main() -> None:
    """A scale-to-zero gateway: it holds the sockets, the services sleep until somebody connects."""


# A gateway


def _file_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("file", required=False, envvar="DORMANT_CONFIG", type=click.Path(path_type=Path))(command)


def _find(file: Path | None) -> Path:
    if file is not None:
        return file
    for candidate in DEFAULT_CONFIGS:
        if os.path.exists(candidate):
            return Path(candidate)
    raise click.UsageError(f"no configuration: name a FILE, or make one of {', '.join(DEFAULT_CONFIGS)}")


def _load(path: Path) -> config.Config:
    try:
        return config.load(path)
    except config.ConfigError as error:
        raise click.ClickException(f"the configuration has errors\n{error}") from error


def _serve(loaded: config.Config, read: Callable[[], config.Config], log: str | None, level: str | None) -> None:
    from gateway import upgrade
    from gateway.listeners import ListenError
    from gateway.server import serve

    if upgrade.is_trial():
        return
    logs.setup(log or loaded.gateway.log, level or loaded.gateway.log_level)
    try:
        status = asyncio.run(serve(loaded, read))
    except ListenError as error:
        raise click.ClickException(str(error)) from error
    finally:
        logs.flush()
    sys.exit(status)


_log_option = click.option(
    "--log", type=click.Choice(["auto", "text", "json"]), help="The form of the log, over the configuration."
)
_level_option = click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Over the configuration."
)


@main.command()
@_file_argument
@_log_option
@_level_option
def run(file: Path | None, log: str | None, log_level: str | None) -> None:
    """Run the gateway in the foreground.

    FILE is the configuration; by default $DORMANT_CONFIG, dormant.yaml here, or /etc/dormant/dormant.yaml. SIGHUP reads it
    again, SIGTERM and Ctrl-C let live connections end first; a second one does not.
    """
    path = _find(file)
    _serve(_load(path), lambda: config.load(path), log, log_level)


@main.command()
@_file_argument
def check(file: Path | None) -> None:
    """Check a configuration, with the code that `run` uses, and say what is wrong with it."""
    path = _find(file)
    loaded = _load(path)
    click.echo(f"{path}: {len(loaded.backends)} backend{'s' * (len(loaded.backends) != 1)}, no errors")


@main.command()
def schema() -> None:
    """Print the JSON Schema of the configuration, for editors."""
    from gateway.schema import schema as make

    click.echo(msgspec.json.format(msgspec.json.encode(make()), indent=2).decode())


@main.command()
@click.option(
    "-l", "--listen", "addresses", multiple=True, required=True, help="Address to listen on; may be repeated."
)
@click.option("--delivery", type=click.Choice(["relay", "pass", "accept"]), help="Default: relay with --to, else pass.")
@click.option("--to", "endpoint", metavar="ADDRESS", help="Where the command listens (delivery relay).")
@click.option("--idle", type=DurationType(), default="30s", show_default=True, help="Quiet for so long, it sleeps.")
@click.option("--ready", help="How it is known to answer: connect (default) or notify.")
@click.option("--name", default="activate", show_default=True, help="Its name in the log.")
@click.option("--admin", metavar="PATH", help="The admin socket; default: a private one.")
@_log_option
@_level_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def activate(
    addresses: tuple[str, ...], delivery: str | None, endpoint: str | None, idle: Duration, ready: str | None, name: str,
    admin: str | None, log: str | None, log_level: str | None, command: tuple[str, ...],
) -> None:  # fmt: skip
    """A sleeping service in one line, without a file: COMMAND is started by the first client.

    \b
    dormant activate -l tcp://127.0.0.1:8080 --to tcp://127.0.0.1:8081 -- python3 -m http.server 8081
    dormant activate -l unix:/tmp/podman.sock -- podman system service -t 0
    dormant activate -l tcp://127.0.0.1:7 --delivery accept -- cat
    """
    backend: dict[str, Any] = {
        "driver": "process",
        "command": list(command),
        "listen": [_address(address) for address in addresses],
        "delivery": delivery or ("relay" if endpoint else "pass"),
        "idle": str(idle),
    }
    backend |= {"endpoint": _address(endpoint)} if endpoint else {}
    backend |= {"ready": ready} if ready else {}
    private = Path(config.default_admin()).with_name(f"activate-{os.getpid()}")  # its holds are not for the next one
    document = {
        "gateway": {"admin": admin or f"{private}.sock", "state_directory": str(private)},
        "backends": {name: backend},
    }

    def read() -> config.Config:
        return config.build(document, Path.cwd(), "command line")

    try:
        loaded = read()
    except config.ConfigError as error:
        raise click.ClickException(str(error)) from error
    _serve(loaded, read, log, log_level)


def _address(text: str) -> str:
    """What systemd-socket-activate takes as well: a bare port, HOST:PORT, a path or @NAME."""
    if re.match(r"[a-z-]+:\D", text):
        return text
    if text.startswith(("/", "./", "@")):
        return f"unix:{text}"
    return f"tcp://*:{text}" if text.isdigit() else f"tcp://{text}"


# Commands to a gateway that runs


_socket_option = click.option(
    "--socket", "path", envvar="DORMANT_SOCKET", default=config.default_admin, show_default="the default of gateway.admin",
    help="The admin socket of the gateway.", show_envvar=True,
)  # fmt: skip


def _ask(work: Coroutine[Any, Any, T]) -> T:
    from gateway.client import AdminError

    try:
        return asyncio.run(work)
    except AdminError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        sys.exit(130)


@main.command()
@click.argument("names", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON; with --watch one line for each change.")
@click.option("-w", "--watch", is_flag=True, help="Stay, and show each change.")
@_socket_option
def status(names: tuple[str, ...], as_json: bool, watch: bool, path: str) -> None:
    """Show the backends: who is awake, who uses them, when they will sleep."""
    if as_json and watch:
        _ask(_watch_json(path, names))
    else:
        _ask(_watch(path, names) if watch else _show(path, names, as_json))


async def _show(path: str, names: tuple[str, ...], as_json: bool) -> None:
    from rich.console import Console

    from gateway.client import Client
    from gateway.show import table

    async with Client(path) as client:
        found = await client.status(*names)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        console = Console()
        width = console.width if console.is_terminal else 200
        Console(width=width).print(table(found, width))


async def _watch(path: str, names: tuple[str, ...]) -> None:
    from rich.live import Live

    from gateway.client import Client
    from gateway.show import table

    async with Client(path) as client:
        found = await client.status(*names)
        with Live(auto_refresh=False) as live:
            live.update(table(found, live.console.width), refresh=True)
            changed = asyncio.Event()

            async def listen() -> None:
                async for _ in client.events():
                    changed.set()

            listening = asyncio.create_task(listen(), name="events")
            while not listening.done():
                with contextlib.suppress(TimeoutError):  # the countdowns go on without a change
                    async with asyncio.timeout(1):
                        await changed.wait()
                changed.clear()
                live.update(table(await client.status(*names), live.console.width), refresh=True)
            await listening


async def _watch_json(path: str, names: tuple[str, ...]) -> None:
    from gateway.client import Client

    async with Client(path) as client:
        async for found in client.watch(*names):
            click.echo(msgspec.json.encode(found))


async def _order(path: str, name: str, verb: str, **query: str) -> None:
    from gateway.client import Client

    async with Client(path) as client:
        click.echo(f"{name}: {await client.order(name, verb, **query)}")


@main.command()
@click.argument("name")
@_socket_option
def start(name: str, path: str) -> None:
    """Start a backend as if a client had come; wait until it is ready."""
    _ask(_order(path, name, "start"))


@main.command()
@click.argument("name")
@_socket_option
def stop(name: str, path: str) -> None:
    """Stop a backend now, also while it is used. The next client starts it again."""
    _ask(_order(path, name, "stop"))


@main.command()
@click.argument("name")
@click.option("--for", "duration", type=DurationType(), help="For so long; default: until released.")
@_socket_option
def hold(name: str, duration: Duration | None, path: str) -> None:
    """Wake a backend and keep it awake."""
    _ask(_order(path, name, "hold", **({} if duration is None else {"seconds": repr(float(duration))})))


@main.command()
@click.argument("name")
@_socket_option
def release(name: str, path: str) -> None:
    """Let a held backend sleep again."""
    _ask(_order(path, name, "release"))


@main.command("logs")
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines.")
@_socket_option
def show_logs(name: str, follow: bool, path: str) -> None:
    """Show the last output of a backend."""
    _ask(_logs(path, name, follow))


async def _logs(path: str, name: str, follow: bool) -> None:
    from gateway.client import Client

    async with Client(path) as client:
        async for line in client.logs(name, follow):
            click.echo(line)


@main.command()
@_socket_option
def reload(path: str) -> None:
    """Read the configuration again. With errors in it, nothing changes."""
    _ask(_reload(path))


async def _reload(path: str) -> None:
    from gateway.client import Client

    async with Client(path) as client:
        click.echo(await client.reload())


@main.command("upgrade")
@_socket_option
def replace(path: str) -> None:
    """Let the version on the disk take over. No connection is lost, and backends keep running."""
    _ask(_upgrade(path))


async def _upgrade(path: str) -> None:
    from gateway.client import AdminError, Client

    async with Client(path) as client:
        before = (await client.status()).started
        await client.upgrade()
    # The admin socket stays open all the while: the next answer comes from the new version.
    async with Client(path) as client:
        after = await client.status()
    if after.started == before:
        raise AdminError("it did not take place; the gateway's log says why")
    click.echo(f"version {after.version} has taken over")


if __name__ == "__main__":
    main()

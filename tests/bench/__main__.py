"""`python -m tests.bench`: run scenarios, print one table."""

from __future__ import annotations

import dataclasses
import resource
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console

from tests.bench import report
from tests.bench.results import selected
from tests.bench.rounds import SHORT, Bench, Plan
from tests.bench.scenarios import NAMES, SCENARIOS

WIDTH = 220
FULL = Plan()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", help="Scenarios, separated by commas: relay, relay.new, relay.bulk.unix, cold.one; see --list.")
@click.option("--list", "listing", is_flag=True, help="Print the names of the scenarios.")
@click.option("--short", is_flag=True, help="Fewer and smaller samples: under two minutes in all, and less certain.")
@click.option("--rounds", type=click.IntRange(1, 1000), help=f"Alternating rounds.  [default: {FULL.rounds}]")
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 600),
    help=f"Of load for one sample; wrk takes whole ones.  [default: {FULL.seconds:g}]",
)
@click.option("--workers", type=click.IntRange(1, 64), help="One more Dormant as a peer, with gateway.workers: N.")
@click.option(
    "--compare", multiple=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Another checkout of Dormant as a peer: before and after a change. Repeatable.",
)  # fmt: skip
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Every sample.")
@click.option(
    "--markdown", "markdown_file", type=click.Path(dir_okay=False, path_type=Path), help="The report as a file."
)
def main(
    only: str | None, listing: bool, short: bool, rounds: int | None, seconds: float | None, workers: int | None,
    compare: tuple[Path, ...], json_file: Path | None, markdown_file: Path | None,
) -> None:  # fmt: skip
    """Measure Dormant beside its peers, in one run, in alternating rounds."""
    if listing:
        click.echo("\n".join(NAMES))
        return
    plan = SHORT if short else FULL
    given = {"rounds": rounds, "seconds": seconds, "workers": workers}
    changes = {name: value for name, value in given.items() if value is not None}
    plan = dataclasses.replace(plan, only=names(only), compare=compare, **changes)  # type: ignore[arg-type]

    with tempfile.TemporaryDirectory(prefix="dormant-bench-", ignore_cleanup_errors=True) as directory:
        bench = Bench(Path(directory), plan)
        try:
            measure(bench)
        finally:
            bench.progress.done()
            tell(bench, json_file, markdown_file)
    sys.exit(1 if bench.failures else 0)


def names(only: str | None) -> tuple[str, ...]:
    wanted = tuple(name.strip() for name in only.split(",")) if only else ()
    for name in wanted:
        if not any(selected(known, [name]) for known in NAMES):
            raise click.BadParameter(
                f"{name!r} is none of: {', '.join(NAMES)}, nor the beginning of one", param_hint="--only"
            )
    return wanted


def measure(bench: Bench) -> None:
    # Idle connections and sleeping backends need many descriptors, and the peers inherit the limit.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, interrupted)  # so that everything that was started is ended
    for run in SCENARIOS.values():
        run(bench)


def interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def tell(bench: Bench, json_file: Path | None, markdown_file: Path | None) -> None:
    """What there is, also when it was interrupted."""
    machine = report.machine()
    Console(width=WIDTH).print(report.table(bench.results))
    click.echo()
    for aim in report.aims(bench.results):
        click.echo("  ".join(aim))
    for failure in bench.failures:
        click.echo(f"could not be measured: {failure}")
    if json_file:
        json_file.write_text(report.as_json(bench.results, bench.plan, machine))
    if markdown_file:
        command = shlex.join(["python", "-m", "tests.bench", *sys.argv[1:]])
        markdown_file.write_text(report.markdown(bench.results, bench.plan, machine, command))


if __name__ == "__main__":
    main()

"""`python -m tests.bench`: run scenarios, print one table."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.bench.scenarios import SCENARIOS, Result, overhead


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=5, show_default=True, help="Alternating rounds of each scenario.")
@click.option("--seconds", default=2.0, show_default=True, help="Length of one measurement.")
@click.option("--only", default=",".join(SCENARIOS), show_default=True, help="Scenarios, separated by commas.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every sample to this file.")
def main(rounds: int, seconds: float, only: str, json_file: Path | None) -> None:
    """Measure Dormant beside its peers, in one run."""
    names = only.split(",")
    unknown = sorted(set(names) - set(SCENARIOS))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}; there are: {', '.join(SCENARIOS)}", param_hint="--only")
    results = []
    with tempfile.TemporaryDirectory(prefix="dormant-bench-") as directory:
        for name in names:
            results += SCENARIOS[name](Path(directory), rounds, seconds)
    sys.stderr.write("\r\033[K")
    Console(width=130).print(table(results))
    for result in results:
        if "alone" in result.samples:
            middle, high = overhead(result)
            click.echo(f"{result.title}: Dormant adds {middle:.1f} ms (p50), {high:.1f} ms (p99)")
    if json_file:
        json_file.write_text(json.dumps([asdict(result) for result in results], indent=1))


def table(results: list[Result]) -> Table:
    """Medians; the ratio is against HAProxy in the same round, with its spread."""
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("scenario", "peer", "median", "ratio", "spread", "p50 us", "p99 us", "CPU", "errors"):
        grid.add_column(heading, justify="left" if heading in ("scenario", "peer", "errors") else "right")
    for result in results:
        reference = "haproxy" if "haproxy" in result.samples else next(iter(result.samples))
        title = f"{result.title} ({result.unit})"
        for peer, samples in result.samples.items():
            ratios = result.ratios(peer, reference)
            grid.add_row(
                title,
                peer,
                f"{statistics.median(sample.rate for sample in samples):,.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
                f"{statistics.median(sample.p50 for sample in samples):,.0f}" if samples[0].p50 else "",
                f"{statistics.median(sample.p99 for sample in samples):,.0f}" if samples[0].p99 else "",
                f"{statistics.median(sample.cpu for sample in samples):.1f}" if samples[0].cpu else "",
                next((sample.errors for sample in samples if sample.errors), ""),
            )
            title = ""
    return grid


if __name__ == "__main__":
    main()

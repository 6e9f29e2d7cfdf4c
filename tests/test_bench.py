"""The bench itself: what it makes of figures and of what its clients say, and one small run of it. Nothing is timed."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.bench import load, report
from tests.bench.__main__ import main
from tests.bench.peers import Peer
from tests.bench.processes import Address, Usage, process, usage
from tests.bench.results import Result, Sample, percentile, selected
from tests.bench.rounds import SHORT, Bench
from tests.bench.scenarios import NAMES, SCENARIOS
from tests.bench.scenarios.cold import FirstBytes
from tests.conftest import program

ROOT = Path(__file__).parent.parent

WRK = """Running 2s test @ http://127.0.0.1:9100/k
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   497.21us  333.23us   8.66ms   92.97%
    Req/Sec    67.87k    12.10k   86.60k    65.00%
  Latency Distribution
     50%  378.00us
     75%  541.00us
     90%  843.00us
     99%    1.51ms
  135117 requests in 2.00s, 168.93MB read
  Socket errors: connect 0, read 3, write 0, timeout 0
Requests/sec:  67543.57
Transfer/sec:     84.45MB
"""

REDIS = """"test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms","p95_latency_ms","p99_latency_ms","max_latency_ms"
"get k","42016.80","0.528","0.096","0.439","0.983","1.343","4.591"
"""


def result(**values: list[float]) -> Result:
    made = Result("relay.new.tcp", "new connections", "requests/s")
    for peer, rounds in values.items():
        for value in rounds:
            made.add(peer, Sample(value))
    return made


# Figures


def test_ratios_are_made_in_the_same_round() -> None:
    made = result(haproxy=[100, 200, 50], dormant=[90, 220, 50])
    assert made.ratios("dormant", "haproxy") == pytest.approx([0.9, 1.1, 1.0])
    assert made.median("dormant") == 90
    assert made.ratios("nobody", "haproxy") == []
    assert math.isnan(made.median("nobody"))


def test_a_round_that_failed_counts_for_nobody() -> None:
    made = result(haproxy=[100, 200, 50], dormant=[90])
    made.add("dormant", Sample(math.nan, error="it broke"))
    made.add("dormant", Sample(100))
    assert made.ratios("dormant", "haproxy") == pytest.approx([0.9, 2.0])
    assert made.median("dormant") == 95
    assert made.error("dormant") == "it broke"


def test_percentiles() -> None:
    values = [float(value) for value in range(1, 201)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([7.0], 0.99)) == (100, 198, 7)
    assert math.isnan(percentile([], 0.5))


def test_what_is_added_to_a_cold_start() -> None:
    made = Result("cold.one", "cold", "ms", baseline="alone")
    made.add("alone", Sample(0, times=(2.0, 3.0, 9.0)))
    made.add("dormant", Sample(0, times=(5.0, 4.0, 12.0)))
    assert made.added("dormant", ranked=False) == (2.0, 9.0)
    assert made.added("dormant", ranked=True) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("name", "only", "expected"),
    [
        ("relay.new.tcp", [], True),
        ("relay.new.tcp", ["relay"], True),
        ("relay.new.tcp", ["cold", "relay.new"], True),
        ("relay.new.tcp", ["relay.new.tcp"], True),
        ("relay.new.tcp", ["relay.ne"], False),
        ("relay.new.tcp", ["relay.new.tcp.32"], False),
    ],
)
def test_selection(name: str, only: list[str], expected: bool) -> None:
    assert selected(name, only) is expected


def test_every_scenario_can_be_selected() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert {name.partition(".")[0] for name in NAMES} == set(SCENARIOS)
    assert all(any(selected(aim.result, [name]) for name in NAMES) for aim in report.AIMS)


# What clients say


def test_wrk_is_understood() -> None:
    assert load.read_wrk(WRK) == {"count": 135117, "rate": 67543.57, "p50": 378, "p99": 1510}
    with pytest.raises(AssertionError, match="no rate"):
        load.read_wrk(WRK.partition("Requests/sec")[0])
    with pytest.raises(AssertionError, match="no time"):
        load.microseconds("soon")


def test_redis_benchmark_is_understood() -> None:
    said = load.read_redis_benchmark(REDIS)
    assert (said["rps"], said["p50_latency_ms"], said["p99_latency_ms"]) == (42016.8, 0.439, 1.343)
    with pytest.raises(AssertionError, match="refused"):
        load.read_redis_benchmark("Could not connect: connection refused")


def test_cpu_time_is_divided_as_the_ticks_say() -> None:
    before, after = Usage(user=1.0, system=1.0, running=2.0), Usage(user=1.1, system=1.3, running=2.2, rss=5, pss=4)
    sample = load.sample(9.0, before, after, 1000)
    assert (sample.user, sample.system) == pytest.approx((50, 150))
    assert (sample.value, sample.rss, sample.pss) == (9.0, 5, 4)


# The report


def test_the_table_has_a_row_for_each_peer() -> None:
    made = result(direct=[200, 200], haproxy=[100, 100], dormant=[90, 110])
    made.notes["dormant-2"] = "not supported"
    rows = [dict(zip(report.HEADINGS, row, strict=True)) for row in report.rows([made])]
    assert [row["peer"] for row in rows] == ["direct", "haproxy", "dormant", "dormant-2"]
    assert [row["scenario"] for row in rows] == ["new connections", "", "", ""]
    dormant = rows[2]
    assert (dormant["median"], dormant["ratio"], dormant["spread"], dormant["/direct"]) == (
        "100", "1.00", "0.90-1.10", "0.50",
    )  # fmt: skip
    assert rows[3]["notes"] == "not supported"
    assert not rows[3]["median"]


def test_an_aim_is_reached_or_not() -> None:
    assert report.aims([result(haproxy=[100, 100], dormant=[100, 102])])[0][1:] == ("1.01 (1.00-1.02)", "reached")
    assert report.aims([result(haproxy=[100], dormant=[90])])[0][2] == "not reached"
    assert report.aims([result(haproxy=[100])]) == []


def test_the_report_as_a_file() -> None:
    made = result(haproxy=[100], dormant=[math.nan])
    machine = {"kernel": "Linux"}
    document = json.loads(report.as_json([made], SHORT, machine))
    assert document["results"][0]["samples"]["dormant"][0]["value"] is None
    text = report.markdown([made], SHORT, machine, "make bench")
    assert "- kernel: Linux" in text
    assert "| new connections | haproxy | 100 |" in text


# Running


def test_rounds_alternate_and_a_failure_ends_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, replace(SHORT, rounds=2))
    order = []

    def measure(peer: Peer) -> Sample:
        order.append(peer.name)
        if peer.name == "b":
            raise OSError("it broke")
        return Sample(1.0)

    made = result()
    there = [Peer("a", Address(1)), Peer("b", Address(2)), Peer("c", Address(), note="not installed")]
    bench.alternate(made, there, measure)
    assert order == ["a", "b", "b", "a"]
    assert made.notes == {"c": "not installed"}
    assert made.error("b") == "it broke (and in 1 more rounds)"
    with bench.scenario("rest"):
        raise AssertionError("no")
    assert bench.failures == ["rest: no"]


def test_a_program_is_gone_afterwards(tmp_path: Path) -> None:
    with process([program("sleep"), "60"]) as pid:
        used = usage([pid, 2**30])
        assert used.descriptors >= 3
        assert 0 < used.pss <= used.rss
    assert usage([pid]) == Usage()
    with pytest.raises(AssertionError, match="ended with 3"), process([program("sh"), "-c", "exit 3"], Address(1)):
        pass


@contextmanager
def answering() -> Iterator[tuple[int, threading.Event]]:
    """A port at which nobody listens until the event is set; then it answers a byte."""
    go = threading.Event()
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))

        def serve() -> None:
            go.wait(10)
            server.settimeout(10)
            server.listen()
            with server.accept()[0] as client:
                client.recv(100)
                client.send(b"x")

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1], go
        go.set()
        thread.join()


def test_a_refused_client_tries_again() -> None:
    with answering() as (port, go), closing(FirstBytes(0.001)) as clients:
        clients.ask(port)
        clients.turn(0.01)
        assert not clients.took
        go.set()
        assert len(clients.all()) == 1


@pytest.mark.slow
def test_a_small_run(tmp_path: Path) -> None:
    """All relays that are installed, before a sink on a Unix socket; and datagrams."""
    files = tmp_path / "all.json", tmp_path / "all.md"
    command = [
        sys.executable,
        "-m",
        "tests.bench",
        "--short",
        "--rounds",
        "1",
        "--only",
        "relay.bulk.unix.up.1,udp.latency",
    ]
    command += ["--seconds", "0.1", "--json", str(files[0]), "--markdown", str(files[1])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    bulk, latency = json.loads(files[0].read_text())["results"]
    assert bulk["samples"]["dormant"][0]["value"] > 0, bulk
    assert bulk["samples"]["direct"][0]["value"] > 0
    assert latency["samples"]["direct"][0]["p50"] > 0
    assert "bulk up, 1 stream, Unix" in done.stdout
    assert "| dormant |" in files[1].read_text()


def test_an_unknown_scenario_is_told() -> None:
    done = CliRunner().invoke(main, ["--only", "relay.old"])
    assert done.exit_code == 2
    assert "relay.keepalive.tcp.32" in done.output

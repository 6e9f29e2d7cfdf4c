"""How much is measured, and the alternating rounds."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.peers import Peer
from tests.bench.results import Result, Sample, selected


@dataclass(frozen=True)
class Plan:
    """How much is measured. The defaults are the full form."""

    rounds: int = 5
    fresh_rounds: int = 3
    """at most so many where each sample needs fresh processes"""
    seconds: float = 2.0
    """of load for one sample; wrk takes whole ones, at least one"""
    bulk: int = 1200
    """MB in one sample, all streams together"""
    idle: int = 5000
    """connections"""
    starts: int = 200
    """of one backend"""
    wave: int = 100
    """backends that are woken at once"""
    sleeping: int = 10_000
    """backends that sleep"""
    rest: float = 60.0
    """seconds of looking at a gateway that has nothing to do"""
    only: tuple[str, ...] = ()
    workers: int | None = None
    """one more Dormant, with so many workers"""
    unix_connections: tuple[int, ...] = (1, 32, 256)
    """how many connections are kept at a time, over Unix sockets"""
    compare: tuple[Path, ...] = ()
    """other checkouts of Dormant, each one peer more"""


SHORT = Plan(
    rounds=2, fresh_rounds=1, seconds=0.4, bulk=200, idle=500, starts=20, wave=20, sleeping=1000, rest=5.0,
    unix_connections=(32,),
)  # fmt: skip
"""Under two minutes in all. Too short for a verdict: for whether the bench itself works, and for large differences."""


class Progress:
    """What is being done, on stderr: one line that changes on a terminal, else a line for each scenario."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def say(self, text: str, step: bool = False) -> None:
        """`step`: one of many; only a terminal shows it."""
        took = time.monotonic() - self.begun
        if self.terminal:
            print(f"\r\033[K{took:5.0f} s  {text}", end="", file=sys.stderr, flush=True)
        elif not step:
            print(f"{took:5.0f} s  {text}", file=sys.stderr, flush=True)

    def problem(self, text: str) -> None:
        """Something that stays on the screen."""
        clear = "\r\033[K" if self.terminal else ""
        print(f"{clear}{text}", file=sys.stderr, flush=True)

    def done(self) -> None:
        self.say("done")
        if self.terminal:
            print(file=sys.stderr)


@dataclass
class Bench:
    """One run: where it keeps its files, what it does, what it found."""

    directory: Path
    plan: Plan
    progress: Progress = field(default_factory=Progress)
    results: list[Result] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def wants(self, *names: str) -> bool:
        """Whether any of these scenarios is asked for."""
        return any(selected(name, self.plan.only) for name in names)

    def alternate(
        self, result: Result, peers: Sequence[Peer], measure: Callable[[Peer], Sample], rounds: int | None = None
    ) -> None:
        """All peers in each round, in one order and then in the other. A peer that fails has no figure in that round."""
        self.results.append(result)
        self.progress.say(result.title)
        rounds = self.plan.rounds if rounds is None else rounds
        there = [peer for peer in peers if peer.available]
        for turn in range(rounds):
            for peer in there if turn % 2 == 0 else reversed(there):
                self.progress.say(f"{result.title}: round {turn + 1} of {rounds}, {peer.name}", step=True)
                try:
                    sample = measure(peer)
                except (AssertionError, OSError) as error:
                    sample = Sample(math.nan, error=str(error).strip().partition("\n")[0] or type(error).__name__)
                    self.progress.problem(f"{result.name}, {peer.name}: {sample.error}")
                result.add(peer.name, sample)
        for peer in peers:
            if peer.note:
                result.notes[peer.name] = peer.note

    @contextlib.contextmanager
    def scenario(self, name: str) -> Iterator[None]:
        """A scenario that cannot be run does not end the others."""
        try:
            yield
        except (AssertionError, OSError) as error:
            self.failures.append(f"{name}: {error}")
            self.progress.problem(self.failures[-1])

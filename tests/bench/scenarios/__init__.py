"""The scenarios of the bench, by the first part of their names."""

from __future__ import annotations

from collections.abc import Callable

from tests.bench.rounds import Bench
from tests.bench.scenarios import cold, handover, relay, rest, udp

SCENARIOS: dict[str, Callable[[Bench], None]] = {
    "relay": relay.run,
    "cold": cold.run,
    "pass": handover.run,
    "rest": rest.run,
    "udp": udp.run,
}

NAMES = (*relay.NAMES, *cold.NAMES, *handover.NAMES, *rest.NAMES, *udp.NAMES)

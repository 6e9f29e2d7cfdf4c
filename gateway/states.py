"""The states of a backend, and what can happen in each: the table. What it does not list is an error.

Counterpart: `gateway.activation` makes things happen. The table in the README is drawn from this one.
"""

from __future__ import annotations

import enum


class State(enum.Enum):
    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    FROZEN = "frozen"
    STOPPING = "stopping"


class Event(enum.Enum):
    WAKE = "wake"
    STARTED = "started"
    START_FAILED = "start failed"
    FREEZE = "quiet: freeze"
    SLEEP = "quiet: stop"
    SLEPT = "slept"
    DIED = "died"
    REFUSED = "refused"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.STOPPED, Event.WAKE): State.STARTING,
    (State.STARTING, Event.STARTED): State.READY,
    (State.STARTING, Event.START_FAILED): State.STOPPED,
    (State.READY, Event.REFUSED): State.STARTING,
    (State.READY, Event.FREEZE): State.FROZEN,
    (State.READY, Event.SLEEP): State.STOPPING,
    (State.READY, Event.DIED): State.STOPPED,
    (State.FROZEN, Event.WAKE): State.READY,
    (State.FROZEN, Event.SLEEP): State.STOPPING,
    (State.FROZEN, Event.DIED): State.STOPPED,
    (State.STOPPING, Event.SLEPT): State.STOPPED,
}


class IllegalTransition(Exception):
    """A bug: this event must not happen in this state. Nothing was changed."""


def transition(state: State, event: Event) -> State:
    """The next state. Raises IllegalTransition for what the table does not list."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"{event.value!r} in state {state.value!r}") from None

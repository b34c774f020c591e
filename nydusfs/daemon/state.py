"""The daemon's states and the events that change them, as upstream's clients see them."""

from __future__ import annotations

import logging
import os
from enum import Enum

from nydusfs.daemon.errors import UnexpectedEventError

log = logging.getLogger("nydusfs.daemon")


class State(Enum):
    INIT = "INIT"
    READY = "READY"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"


class Event(Enum):
    MOUNT = "Mount"
    TAKEOVER = "Takeover"
    START = "Start"
    STOP = "Stop"
    EXIT = "Exit"


# (state, event) -> (next state, what upstream calls the action in its log line)
_TRANSITIONS: dict[tuple[State, Event], tuple[State, str]] = {
    (State.INIT, Event.MOUNT): (State.READY, "None"),
    (State.INIT, Event.TAKEOVER): (State.READY, "Some(Restore)"),
    (State.INIT, Event.STOP): (State.STOPPED, "None"),
    (State.READY, Event.START): (State.RUNNING, "Some(StartService)"),
    (State.READY, Event.STOP): (State.STOPPED, "Some(Umount)"),
    (State.READY, Event.EXIT): (State.STOPPED, "Some(StopStateMachine)"),
    (State.RUNNING, Event.STOP): (State.READY, "Some(TerminateService)"),
}
_LOG_NAMES = {State.INIT: "Init", State.READY: "Ready", State.RUNNING: "Running", State.STOPPED: "Die"}


class StateMachine:
    def __init__(self) -> None:
        self.state = State.INIT

    def step(self, event: Event) -> None:
        """Raises `UnexpectedEventError` and changes nothing when the event has no meaning in this state."""
        found = _TRANSITIONS.get((self.state, event))
        if found is None:
            raise UnexpectedEventError(event.value)
        after, action = found
        log.info(
            "State machine(pid=%d): from %s to %s, input [%s], output [%s]",
            os.getpid(),
            _LOG_NAMES[self.state],
            _LOG_NAMES[after],
            event.value,
            action,
        )
        self.state = after

    def expect(self, event: Event) -> None:
        """Raises `UnexpectedEventError` when the event has no meaning in this state; changes nothing."""
        if (self.state, event) not in _TRANSITIONS:
            raise UnexpectedEventError(event.value)

    def stop(self) -> None:
        """To STOPPED from wherever we are, by the transitions a signal causes."""
        while self.state is not State.STOPPED:
            self.step(Event.STOP)

    def exit(self) -> None:
        """To STOPPED for a successor: the kernel mount is not touched."""
        if self.state is State.RUNNING:
            self.step(Event.STOP)
        self.step(Event.EXIT if self.state is State.READY else Event.STOP)

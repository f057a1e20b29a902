"""Attempts that a leader gave up and that a worker still names: it is told to stop them, each once per session."""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.control.interface import Action, StopLaunch
from coordinator.control.launch_reports import was_given_up
from coordinator.machine.state import LaunchKey, State


class GivenUp:
    """Who was told what. Soft state of the launch tracker."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[int, set[tuple[LaunchKey, int]]]] = {}
        """By worker: in which session, and what it was told to stop and still names."""

    def stops(self, state: State, session: int, node_id: str, named: Iterable[tuple[LaunchKey, int]]) -> list[Action]:
        """What to tell a worker whose heartbeat names these attempts."""
        told_in, told = self._told.pop(node_id, (session, set()))
        told = told & set(named) if told_in == session else set()
        launches = state.launches
        new = [(key, attempt) for key, attempt in named if (key, attempt) not in told and key in launches]
        new = [(key, attempt) for key, attempt in new if was_given_up(launches[key], attempt)]
        if told or new:
            self._told[node_id] = (session, told | set(new))
        return [StopLaunch(node_id, *key, attempt, f"attempt {attempt} was given up") for key, attempt in new]

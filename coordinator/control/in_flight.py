"""Proposals on their way, at most one per subject.

A subject is busy from its `propose` until the outcome is known *and* the state that the controller holds shows it: a
result may arrive before the Applied event of the same entry, and deciding in between would decide on an old state.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from coordinator.api.v1 import command_pb2
from coordinator.control.interface import ProposalEnded, Propose, Tokens

Subject = TypeVar("Subject", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Ended(Generic[Subject]):
    """The outcome of a subject's proposal is known."""

    subject: Subject
    applied: bool
    refusal: str
    """The machine's words when it refused; empty otherwise. Neither applied nor refused: it failed, maybe only here."""


class InFlight(Generic[Subject]):
    """The subjects that wait for the end of a proposal."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._subject_of: dict[int, Subject] = {}
        self._busy: set[Subject] = set()
        self._unseen: dict[Subject, int] = {}
        """Raft index of results that came before the state that shows them."""

    def __contains__(self, subject: Subject) -> bool:
        return subject in self._busy

    def propose(self, subject: Subject, command: command_pb2.Command) -> Propose:
        """Marks the subject busy; it must not be so already."""
        assert subject not in self._busy, f"{subject!r} has a proposal on its way"
        token = self._tokens.next()
        self._subject_of[token] = subject
        self._busy.add(subject)
        return Propose(token, command)

    def on_ended(self, event: ProposalEnded, state_index: int) -> Ended[Subject] | None:
        """What the event says; None when the proposal is somebody else's. Frees the subject unless the state lags."""
        subject = self._subject_of.pop(event.token, None)
        if subject is None:
            return None
        applied, refusal = False, ""
        if event.result is not None:
            applied = event.result.HasField("applied")
            refusal = event.result.refusal.message or "refused" if event.result.HasField("refusal") else ""
        if applied and event.result is not None and event.result.applied.index > state_index:
            self._unseen[subject] = event.result.applied.index
        else:
            self._busy.discard(subject)
        return Ended(subject, applied, refusal)

    def on_state(self, state_index: int) -> list[Subject]:
        """The subjects that the state at this index frees."""
        if not self._unseen:
            return []
        freed = [subject for subject, index in self._unseen.items() if index <= state_index]
        for subject in freed:
            del self._unseen[subject]
            self._busy.discard(subject)
        return freed

"""What a leader does once when it begins: founds the cluster, and makes the configuration's cron jobs true.

A job of the configuration is applied when it is missing, or when it differs and still has the source "config"; one that
the API has changed since stays as the API left it. A job with the source "config" that the file no longer names is
deleted. This is done once for each leader, so an edit through the API is never undone while a leader stays; all masters
should have the same file, or each change of leader brings the other one's jobs back.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from coordinator.api.v1 import command_pb2
from coordinator.config import ClusterConfig
from coordinator.control.interface import Action, Applied, Event, ProposalEnded, Step, Tokens
from coordinator.control.proposals import Outcome, Proposals
from coordinator.machine.codec import job_spec_from_proto, job_spec_to_proto, settings_to_proto
from coordinator.machine.state import State
from coordinator.model import ClusterSettings, CronJobSpec, Monotonic, WallMs

CONFIG_SOURCE = "config"
BOOTSTRAP = "cluster"
"""Subject of the founding; jobs have the subject "job/" and their id."""


class Founding:
    """The founding controller of one leader; idle once its list is done."""

    def __init__(self, state: State, config: ClusterConfig, tokens: Tokens, rng: random.Random) -> None:
        self._state = state
        self._config = config
        self._proposals = Proposals("founding", tokens)
        self._cluster_id = f"{rng.getrandbits(128):032x}"
        self._todo: dict[str, CronJobSpec | None] | None = None
        """Jobs to apply, or to delete (None); None before the cluster exists."""
        self._problems: list[str] = []

    @property
    def problems(self) -> tuple[str, ...]:
        """What the machine refused of the configuration, one sentence each."""
        return tuple(self._problems)

    def on_event(self, now: Monotonic, wall: WallMs, event: Event) -> Step:
        """Takes an event in."""
        match event:
            case Applied():
                self._state = event.state
            case ProposalEnded():
                ended = self._proposals.end(now, event)
                job_id = ended.subject.removeprefix("job/") if ended is not None else ""
                if ended is not None and self._todo is not None and job_id in self._todo:
                    if ended.outcome is Outcome.REFUSED:
                        self._problems.append(f"cron job {job_id} of the configuration was refused: {ended.reason}")
                    if ended.outcome in (Outcome.APPLIED, Outcome.REFUSED):
                        del self._todo[job_id]
            case _:
                pass
        return self._step(now)

    def on_advance(self, now: Monotonic, wall: WallMs) -> Step:
        """Takes the passing of time in."""
        return self._step(now)

    def _step(self, now: Monotonic) -> Step:
        if not self._state.cluster_id:
            actions: tuple[Action, ...] = self._found(now)
        elif self._todo is None:
            self._todo = self._differences()
            actions = tuple(self._apply_jobs(now))
        elif self._todo:
            actions = tuple(self._apply_jobs(now))
        else:
            return Step()
        return Step(actions, self._proposals.next_free(now))

    def _found(self, now: Monotonic) -> tuple[Action, ...]:
        settings = ClusterSettings(
            replicas=self._config.placement.replicas, launches_kept=self._config.cron.launches_kept,
            launches_kept_s=self._config.cron.launches_kept_s,
        )
        bootstrap = command_pb2.BootstrapCluster(
            cluster_id=self._cluster_id, shards=self._config.placement.shards, settings=settings_to_proto(settings)
        )
        command = command_pb2.Command(bootstrap_cluster=bootstrap)
        return self._proposals.propose(now, self._state.index, BOOTSTRAP, command)

    def _differences(self) -> dict[str, CronJobSpec | None]:
        # Through the contract and back: the state holds what a message can say, in its order.
        wanted = {spec.id: job_spec_from_proto(job_spec_to_proto(spec)) for spec in self._config.cron.jobs}
        todo: dict[str, CronJobSpec | None] = {}
        for job_id in sorted({*wanted, *self._state.jobs}):
            spec, job = wanted.get(job_id), self._state.jobs.get(job_id)
            if job is None or (job.source == CONFIG_SOURCE and job.spec != spec):
                todo[job_id] = spec
        return todo

    def _apply_jobs(self, now: Monotonic) -> Iterator[Action]:
        for job_id, spec in (self._todo or {}).items():
            if spec is None:
                command = command_pb2.Command(delete_job=command_pb2.DeleteJob(job_id=job_id))
            else:
                apply = command_pb2.ApplyJob(spec=job_spec_to_proto(spec), source=CONFIG_SOURCE)
                command = command_pb2.Command(apply_job=apply)
            yield from self._proposals.propose(now, self._state.index, f"job/{job_id}", command)

"""Which workers can run a job now, and in words why none can. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from coordinator.machine.state import State
from coordinator.model import CatchUpPolicy, CronJob, NodeState


def serving_workers(state: State, job: CronJob) -> list[str]:
    """The job's owner and backups that can run something now and have its labels, in this order."""
    found = []
    for name in (job.owner, *job.backups):
        node = state.nodes.get(name) if name else None
        if node is not None and node.is_serving and node.has_labels(job.spec.required_labels):
            found.append(name)
    return found


def waits_without_deadline(state: State, job: CronJob) -> bool:
    """True while no worker of the job serves, and what is due is made up for once one does."""
    return job.spec.catch_up is not CatchUpPolicy.NONE and not serving_workers(state, job)


def why_none_serves(state: State, job: CronJob, unfit: Mapping[str, str] = MappingProxyType({})) -> str:
    """Why no worker takes a launch: how each is that could run the job, or that there is none.

    `unfit`: why workers that serve cannot run it; those that are not named there have no free slot.
    """
    if job.spec.required_labels:
        labels = ", ".join(f"{name}={value}" for name, value in job.spec.required_labels)
        known = [node for node in state.nodes.values() if node.state is not NodeState.LEFT]
        if not any(node.has_labels(job.spec.required_labels) for node in known):
            return f"no worker has the labels {labels}"
    candidates = [name for name in (job.owner, *job.backups) if name]
    return ", ".join(_how_it_is(state, job, name, unfit) for name in candidates) or "it has no owner"


def _how_it_is(state: State, job: CronJob, name: str, unfit: Mapping[str, str]) -> str:
    node = state.nodes.get(name)
    if node is None:
        return f"{name} is gone"
    if not node.has_labels(job.spec.required_labels):
        return f"{name} has not the labels"
    if node.is_serving:
        return f"{name} cannot: {unfit[name]}" if name in unfit else f"{name} has no free slot"
    return f"{name} is {'not heard' if node.is_suspect else node.state.name.lower()}"

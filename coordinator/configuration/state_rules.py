"""Rules of [state] that compare it with other options; `rules.py` calls them with its own."""

from __future__ import annotations

from coordinator.config import ClusterConfig
from coordinator.configuration.findings import Findings, number


def check_state(findings: Findings, config: ClusterConfig) -> None:
    """Faults go to `findings`."""
    state, session, placement = config.state, config.session, config.placement
    lease, session_lease = ("state", "replica_lease_s"), ("session", "session_lease_s")
    if findings.is_sound(lease, session_lease) and state.replica_lease_s >= session.session_lease_s:
        findings.refuse(
            lease,
            f"{findings.named(lease, state.replica_lease_s)} is not below "
            f"{findings.named_at(session_lease, session.session_lease_s)}; "
            f"use less than {number(session.session_lease_s)}",
            session_lease,
        )
    in_sync, replicas = ("state", "min_in_sync"), ("placement", "replicas")
    if findings.is_sound(in_sync, replicas) and state.min_in_sync > placement.replicas:
        findings.refuse(
            in_sync,
            f"{findings.named(in_sync, state.min_in_sync)} is above "
            f"{findings.named_at(replicas, placement.replicas)}, so that every write would be refused; "
            f"use at most {placement.replicas}",
            replicas,
        )
    value, user = ("state", "value_bytes_max"), ("state", "user_bytes_max")
    if findings.is_sound(value, user) and state.value_bytes_max > state.user_bytes_max:
        findings.refuse(
            value,
            f"{findings.named(value, state.value_bytes_max)} is above "
            f"{findings.named_at(user, state.user_bytes_max)}; use at most {state.user_bytes_max}",
            user,
        )

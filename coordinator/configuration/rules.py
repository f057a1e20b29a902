"""Rules that a configuration has to keep, beyond types: ranges, forms, and options that must fit together.

They work on settings objects, so a configuration that was built in code is held to the same rules as one from a file.
A rule that compares options is silent while one of them is refused for itself: one fault, one message.
"""

from __future__ import annotations

import re

from coordinator.config import ClusterConfig, WorkerSettings
from coordinator.configuration.addresses import check_address, is_loopback
from coordinator.configuration.fields import PYTHON_PATTERN, check_fields, check_id
from coordinator.configuration.findings import Findings, dotted, number
from coordinator.configuration.job_rules import check_jobs
from coordinator.configuration.state_rules import check_state
from coordinator.configuration.toml_lines import Path

_SERVICE_PATTERN = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
MASTER_COUNTS = (1, 3, 5)
HEARTBEATS_PER_LEASE_MIN = 3
HEARTBEATS_PER_SUSPICION_MIN = 2
APPENDS_PER_ELECTION_MIN = 3
TOLERANCE = 1e-9
"""Relative; so that 0.3 is not below 3 x 0.1."""


def check_cluster(findings: Findings, config: ClusterConfig) -> None:
    """All rules; faults go to `findings`."""
    sections = ("raft", "discovery", "security", "session", "placement", "moves", "state", "cron", "logging", "worker")
    for name in sections:
        check_fields(findings, (name,), getattr(config, name))
    check_fields(findings, ("discovery", "consul"), config.discovery.consul)
    _check_cluster_table(findings, config)
    _check_raft(findings, config)
    _check_session(findings, config)
    _check_placement(findings, config)
    check_state(findings, config)
    _check_consul(findings, config)
    check_jobs(findings, config)
    _check_addresses(findings, config)
    _check_security(findings, config)
    # After the rest: what these refuse is a whole daemon.
    _check_daemons(findings, config)
    _check_master_count(findings, config)


def _check_cluster_table(findings: Findings, config: ClusterConfig) -> None:
    name, directory = ("cluster", "name"), ("cluster", "data_directory")
    if findings.is_sound(name) and (advice := check_id(config.name)):
        findings.refuse(name, f"{findings.named(name, config.name)} is not a name; {advice}")
    if findings.is_sound(directory) and (not config.data_directory.strip() or "\0" in config.data_directory):
        findings.refuse(directory, f'{findings.named(directory, config.data_directory)} is not a folder; use "data"')


def _check_raft(findings: Findings, config: ClusterConfig) -> None:
    raft = config.raft
    shortest, longest = ("raft", "election_timeout_s_min"), ("raft", "election_timeout_s_max")
    append, fallback = ("raft", "append_period_s"), ("raft", "leader_fallback_s")
    if findings.is_sound(append, shortest):
        most_s = raft.election_timeout_s_min / APPENDS_PER_ELECTION_MIN
        if raft.append_period_s > most_s * (1 + TOLERANCE):
            findings.refuse(
                append,
                f"{findings.named(append, raft.append_period_s)} is more than a third of "
                f"{findings.named_at(shortest, raft.election_timeout_s_min)}; use at most {number(most_s)}",
                shortest,
            )
    if findings.is_sound(longest, shortest) and raft.election_timeout_s_min >= raft.election_timeout_s_max:
        findings.refuse(
            longest,
            f"{findings.named(longest, raft.election_timeout_s_max)} is not above "
            f"{findings.named_at(shortest, raft.election_timeout_s_min)}; "
            f"use about {number(raft.election_timeout_s_min * 2)}, so that masters do not all start at once",
            shortest,
        )
    if findings.is_sound(fallback, longest) and raft.leader_fallback_s < raft.election_timeout_s_max:
        findings.refuse(
            fallback,
            f"{findings.named(fallback, raft.leader_fallback_s)} is below "
            f"{findings.named_at(longest, raft.election_timeout_s_max)}; "
            f"use at least {number(raft.election_timeout_s_max)}",
            longest,
        )
    warn, most = ("raft", "clock_offset_warn_s"), ("raft", "clock_offset_max_s")
    if findings.is_sound(warn, most) and raft.clock_offset_warn_s >= raft.clock_offset_max_s:
        findings.refuse(
            most,
            f"{findings.named(most, raft.clock_offset_max_s)} is not above "
            f"{findings.named_at(warn, raft.clock_offset_warn_s)}; "
            f"use about {number(raft.clock_offset_warn_s * 10)}, so that people hear of it before it has effects",
            warn,
        )


def _check_session(findings: Findings, config: ClusterConfig) -> None:
    session = config.session
    heartbeat, lease = ("session", "heartbeat_s"), ("session", "session_lease_s")
    suspect = ("session", "suspect_s")
    if findings.is_sound(heartbeat, lease):
        least_s = session.heartbeat_s * HEARTBEATS_PER_LEASE_MIN
        if session.session_lease_s < least_s * (1 - TOLERANCE):
            findings.refuse(
                lease,
                f"{findings.named(lease, session.session_lease_s)} is less than three times "
                f"{findings.named_at(heartbeat, session.heartbeat_s)}; use at least {number(least_s)}",
                heartbeat,
            )
    if findings.is_sound(heartbeat, suspect):
        least_s = session.heartbeat_s * HEARTBEATS_PER_SUSPICION_MIN
        if session.suspect_s < least_s * (1 - TOLERANCE):
            findings.refuse(
                suspect,
                f"{findings.named(suspect, session.suspect_s)} is less than twice "
                f"{findings.named_at(heartbeat, session.heartbeat_s)}, so that one late heartbeat costs a worker its "
                f"primaries; use at least {number(least_s)}",
                heartbeat,
            )
    if findings.is_sound(suspect, lease) and session.suspect_s >= session.session_lease_s:
        findings.refuse(
            suspect,
            f"{findings.named(suspect, session.suspect_s)} is not below "
            f"{findings.named_at(lease, session.session_lease_s)}; "
            f"use less than {number(session.session_lease_s)}",
            lease,
        )


def _check_placement(findings: Findings, config: ClusterConfig) -> None:
    placement, moves = config.placement, config.moves
    total = ("placement", "moves_max")
    for name in ("moves_in_max", "moves_out_max"):
        place, value = ("placement", name), getattr(placement, name)
        if findings.is_sound(place, total) and value > placement.moves_max:
            findings.refuse(
                place,
                f"{findings.named(place, value)} is above {findings.named_at(total, placement.moves_max)}; "
                f"use at most {placement.moves_max}",
                total,
            )
    merge, users = ("placement", "merge_below_users"), ("placement", "users_max")
    if findings.is_sound(merge, users) and placement.merge_below_users > placement.users_max // 2:
        findings.refuse(
            merge,
            f"{findings.named(merge, placement.merge_below_users)} is more than half of "
            f"{findings.named_at(users, placement.users_max)}, so that what is cut would be joined again; "
            f"use at most {placement.users_max // 2}",
            users,
        )
    cede, copy = ("moves", "cede_deadline_s"), ("moves", "copy_deadline_s")
    if findings.is_sound(cede, copy) and moves.cede_deadline_s > moves.copy_deadline_s:
        findings.refuse(
            cede,
            f"{findings.named(cede, moves.cede_deadline_s)} is above "
            f"{findings.named_at(copy, moves.copy_deadline_s)}; use at most {number(moves.copy_deadline_s)}",
            copy,
        )


def _check_consul(findings: Findings, config: ClusterConfig) -> None:
    consul = config.discovery.consul
    base: Path = ("discovery", "consul")
    address, timeout, interval = (*base, "address"), (*base, "check_timeout_s"), (*base, "check_interval_s")
    if findings.is_sound(address) and (fault := check_address(consul.address)):
        findings.refuse(address, f"{findings.named(address, consul.address)} {fault}")
    if findings.is_sound(timeout, interval) and consul.check_timeout_s > consul.check_interval_s:
        findings.refuse(
            timeout,
            f"{findings.named(timeout, consul.check_timeout_s)} is above "
            f"{findings.named_at(interval, consul.check_interval_s)}; use at most {number(consul.check_interval_s)}",
            interval,
        )
    services = {name: getattr(consul, name) for name in ("coordinator_service", "worker_service")}
    for name, value in services.items():
        place = (*base, name)
        if findings.is_sound(place) and not _SERVICE_PATTERN.fullmatch(value):
            findings.refuse(
                place, f"{findings.named(place, value)} is not a service name; use 1 to 63 letters, digits and hyphens"
            )
    coordinator, worker = (*base, "coordinator_service"), (*base, "worker_service")
    if findings.is_sound(coordinator, worker) and consul.coordinator_service == consul.worker_service:
        findings.refuse(
            worker,
            f"{findings.named(worker, consul.worker_service)} is also the name of the masters: "
            f"{findings.named_at(coordinator, consul.coordinator_service)}; use two names",
            coordinator,
        )


def _check_security(findings: Findings, config: ClusterConfig) -> None:
    security = config.security
    mode, directory = ("security", "mode"), ("security", "directory")
    if findings.is_sound(directory) and (not security.directory.strip() or "\0" in security.directory):
        findings.refuse(
            directory, f'{findings.named(directory, security.directory)} is not a folder; use "certificates"'
        )
    if not findings.is_sound(mode) or security.mode != "plaintext":
        return
    exposed: list[tuple[Path, str]] = [
        (("masters", master.id, name), getattr(master, name))
        for master in config.masters
        for name in ("grpc_address", "peer_address")
    ]
    exposed += [((*base, "grpc_address"), worker.grpc_address) for base, worker in _workers(config)]
    for place, address in exposed:
        if findings.is_sound(place) and check_address(address, 0) is None and not is_loopback(address):
            findings.refuse(
                mode,
                f"{findings.named(mode, security.mode)} with {findings.named_at(place, address)}, where others can "
                'connect and would be allowed everything; use "mtls", or loopback addresses only',
            )
            return


def _check_daemons(findings: Findings, config: ClusterConfig) -> None:
    """Ids and what each daemon says of itself."""
    for worker in config.workers:
        check_fields(findings, ("workers", worker.id), worker, like=config.worker)
    for base, worker in _workers(config):
        place: Path = (*base, "zone")
        is_inherited = base != ("worker",) and worker.zone == config.worker.zone
        if findings.is_sound(place) and worker.zone and not is_inherited and (advice := check_id(worker.zone)):
            findings.refuse(place, f"{findings.named(place, worker.zone)} is not a zone; {advice}")
        place, application = (*base, "application"), worker.application
        is_inherited = base != ("worker",) and application == config.worker.application
        if findings.is_sound(place) and application and not (is_inherited or PYTHON_PATTERN.fullmatch(application)):
            findings.refuse(place, f'{findings.named(place, application)} is not a class; use "package.module:Class"')
    seen: dict[str, Path] = {}
    daemons = [("masters", master.id) for master in config.masters]
    daemons += [("workers", worker.id) for worker in config.workers]
    for path in daemons:
        if advice := check_id(path[1]):
            findings.refuse(path, f"{dotted(path)} has no usable id; {advice}")
            continue
        # Folders of some systems do not tell capital letters from small ones.
        first = seen.setdefault(path[1].casefold(), path)
        if first != path:
            findings.refuse(
                path, f"{dotted(path)} has the id of {dotted(first)}, and its data folder; give every daemon its own"
            )


def _check_master_count(findings: Findings, config: ClusterConfig) -> None:
    if findings.is_sound(("masters",)) and len(config.masters) not in MASTER_COUNTS:
        names = f" ({', '.join(master.id for master in config.masters)})" if config.masters else ""
        findings.refuse(
            ("masters",),
            f"there are {len(config.masters)} masters{names}; use one, three or five tables [masters.ID]: "
            "an even number survives no more faults than the odd number below it",
        )


def _check_addresses(findings: Findings, config: ClusterConfig) -> None:
    """Addresses are well formed, and no two daemons want the same one."""
    wanted: list[tuple[Path, str]] = []
    for master in config.masters:
        for name in ("grpc_address", "peer_address", "http_address"):
            place: Path = ("masters", master.id, name)
            value = getattr(master, name)
            if _has_good_address(findings, place, value, port_min=1):
                wanted.append((place, value))
    for base, worker in _workers(config):
        for name in ("grpc_address", "http_address"):
            place = (*base, name)
            value, default = getattr(worker, name), getattr(config.worker, name)
            is_inherited = base != ("worker",) and value == default
            if is_inherited:
                # What is wrong with it is said once, where it stands.
                is_good = findings.is_sound(("worker", name)) and check_address(value, 0) is None
            else:
                is_good = _has_good_address(findings, place, value, port_min=0)
            # While workers are listed, the defaults are nobody's own.
            if is_good and not (base == ("worker",) and config.workers):
                wanted.append((place, value))
    taken: dict[tuple[str, int], tuple[Path, str]] = {}
    for path, value in wanted:
        host, _, port = value.rpartition(":")
        if int(port) == 0:
            continue
        key = ("127.0.0.1" if host.lower() == "localhost" else host.lower(), int(port))
        first, first_value = taken.setdefault(key, (path, value))
        if first != path:
            other = findings.named_at(first, first_value)
            findings.refuse(path, f"{findings.named(path, value)} is taken by {other}; use another port", first)


def _has_good_address(findings: Findings, path: Path, value: str, port_min: int) -> bool:
    if not findings.is_sound(path):
        return False
    fault = check_address(value, port_min)
    if fault:
        findings.refuse(path, f"{findings.named(path, value)} {fault}")
    return fault is None


def _workers(config: ClusterConfig) -> list[tuple[Path, WorkerSettings]]:
    """The defaults of workers and every worker, each with its path."""
    return [(("worker",), config.worker), *((("workers", worker.id), worker) for worker in config.workers)]

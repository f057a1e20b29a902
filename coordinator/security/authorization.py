"""Which role may make which call: the one table. A call that is not in it is refused for everybody.

A master may make every call of the API, because a follower passes calls on to the leader; it has checked the caller
itself before. A worker may open a session under its own name only (server/sessions.py compares the Hello with the
certificate).
"""

from __future__ import annotations

from coordinator.model.errors import Forbidden, Unauthenticated
from coordinator.security.certificates import Identity, Role

_LOOKS = frozenset({Role.OPERATOR, Role.READER, Role.SERVICE, Role.WORKER, Role.MASTER})
_CHANGES = frozenset({Role.OPERATOR, Role.MASTER})
_SERVES = frozenset({Role.OPERATOR, Role.SERVICE, Role.MASTER})
_EVERYBODY = frozenset(Role)
# Users' state is the applications': services, and the workers themselves, which also pass calls on to each other. A
# reader watches the cluster; what users keep is not its business, only how much.
_STATE_CONTENTS = frozenset({Role.OPERATOR, Role.SERVICE, Role.WORKER})
_STATE_SIZES = _STATE_CONTENTS | {Role.READER}

_CLUSTER = "/coordinator.api.v1.ClusterService/"
_CRON = "/coordinator.api.v1.CronService/"
_STATE = "/coordinator.api.v1.StateService/"

ALLOWED: dict[str, frozenset[Role]] = {
    _CLUSTER + "GetStatus": _LOOKS,
    _CLUSTER + "ListMasters": _LOOKS,
    _CLUSTER + "GetMaster": _LOOKS,
    _CLUSTER + "ListNodes": _LOOKS,
    _CLUSTER + "DrainNode": _CHANGES,
    _CLUSTER + "UndrainNode": _CHANGES,
    _CLUSTER + "RemoveNode": _CHANGES,
    _CLUSTER + "SetNodeWeight": _CHANGES,
    _CLUSTER + "ListShards": _LOOKS,
    _CLUSTER + "LocateKeys": _LOOKS,
    _CLUSTER + "SplitShard": _CHANGES,
    _CLUSTER + "MergeShards": _CHANGES,
    _CLUSTER + "ReleaseShard": _CHANGES,
    _CLUSTER + "PlanRebalance": _LOOKS,
    _CLUSTER + "ChangeSettings": _CHANGES,
    _CLUSTER + "ListMoves": _LOOKS,
    _CLUSTER + "AbortMove": _CHANGES,
    _CLUSTER + "TransferLeadership": _CHANGES,
    _CLUSTER + "ReplaceMaster": _CHANGES,
    # It hands out everything that the masters know, and a cluster can be made from it.
    _CLUSTER + "Backup": _CHANGES,
    _CLUSTER + "StreamEvents": _LOOKS,
    _CRON + "ListJobs": _LOOKS,
    _CRON + "ApplyJobs": _CHANGES,
    _CRON + "DeleteJob": _CHANGES,
    _CRON + "SetJobPaused": _CHANGES,
    _CRON + "TriggerJob": _SERVES,
    _CRON + "CancelLaunches": _CHANGES,
    _CRON + "ListLaunches": _LOOKS,
    "/coordinator.api.v1.LaunchService/ReadOutput": _LOOKS,
    _STATE + "Write": _STATE_CONTENTS,
    _STATE + "Read": _STATE_CONTENTS,
    _STATE + "Scan": _STATE_CONTENTS,
    _STATE + "DescribeUser": _STATE_SIZES,
    _STATE + "Execute": _STATE_CONTENTS,
    "/coordinator.api.v1.ReplicationService/Open": frozenset({Role.WORKER}),
    "/coordinator.api.v1.SessionService/Open": frozenset({Role.WORKER}),
    "/grpc.health.v1.Health/Check": _EVERYBODY,
    "/grpc.health.v1.Health/List": _EVERYBODY,
    "/grpc.health.v1.Health/Watch": _EVERYBODY,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _LOOKS,
}
"""Roles by the full name of the method."""


def is_allowed(role: Role | None, method: str) -> bool:
    """True when a caller of this role may make this call; None is a caller that showed no certificate of ours."""
    return role is not None and role in ALLOWED.get(method, frozenset())


def check(caller: Identity | None, cluster: str, method: str) -> None:
    """Raises Unauthenticated or Forbidden, in one line for people, unless this caller may make this call."""
    if caller is None:
        raise Unauthenticated("the caller's certificate names no role; make one with `clusterctl certs issue`")
    if caller.cluster != cluster:
        raise Unauthenticated(
            f"{caller.uri} belongs to another cluster, this is {cluster!r}; use a certificate of this cluster"
        )
    if not is_allowed(caller.role, method):
        may = " or ".join(sorted(role.value for role in ALLOWED.get(method, frozenset()))) or "nobody"
        call = method.rpartition(".")[2]
        raise Forbidden(f"{caller.uri} may not call {call}: its role is {caller.role.value}, and {may} may")

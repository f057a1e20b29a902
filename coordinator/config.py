"""Settings: what the cluster must agree on, and what one process may choose, as separate types.

`ClusterConfig` is what `config_file.load` makes of cluster.toml. Every field has its default here and nowhere else; the
reference cluster.toml states the same values, and a test compares the two. Durations are seconds (`_s`), sizes bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.model import CronJobSpec


@dataclass(frozen=True, slots=True)
class MasterSettings:
    """One master: where it answers. Every master and worker must have the same table."""

    id: str
    grpc_address: str
    """host:port for clients and workers."""
    peer_address: str
    """host:port for the other masters."""
    http_address: str
    """host:port for health and metrics."""


@dataclass(frozen=True, slots=True)
class RaftSettings:
    """Consensus among the masters. All masters must agree."""

    election_timeout_s_min: float = 0.3
    election_timeout_s_max: float = 0.6
    append_period_s: float = 0.05
    """How often the leader sends a heartbeat; at most a third of election_timeout_s_min."""
    leader_fallback_s: float = 3.0
    """A leader that no majority has answered for so long steps down."""
    command_bytes_max: int = 1 << 20
    """Largest command."""
    proposals_max: int = 10_000
    """Proposals in flight at one master before it refuses more."""
    propose_timeout_s: float = 10.0
    """Default deadline of a proposal."""
    snapshot_entries: int = 20_000
    """Log entries after which a snapshot is written and the log cut."""
    clock_offset_warn_s: float = 0.5
    """A master whose wall clock differs so much from the other masters' is named in the log and by `status`."""
    clock_offset_max_s: float = 5.0
    """One that differs so much refuses to lead; above clock_offset_warn_s."""


@dataclass(frozen=True, slots=True)
class ConsulSettings:
    """How to reach Consul."""

    address: str = "127.0.0.1:8500"
    scheme: str = "http"
    token: str = field(default="", repr=False)
    """ACL token; also read from the environment variable CONSUL_HTTP_TOKEN. Never logged."""
    datacenter: str = ""
    coordinator_service: str = "coordinator"
    worker_service: str = "worker-agent"
    check_interval_s: float = 2.0
    """How often Consul asks a daemon's /health."""
    check_timeout_s: float = 1.0
    deregister_critical_after_s: float = 3600.0
    """Consul forgets a daemon that was critical for so long; Consul's own minimum is 60."""
    poll_wait_s: float = 30.0
    """How long one blocking query waits for news."""


@dataclass(frozen=True, slots=True)
class DiscoverySettings:
    """How masters and workers find each other."""

    backend: str = "embedded"
    """"embedded" (the masters table below) or "consul"."""
    consul: ConsulSettings = field(default_factory=ConsulSettings)


@dataclass(frozen=True, slots=True)
class SecuritySettings:
    """Who may talk to whom. All masters, workers and clients must agree."""

    mode: str = "mtls"
    """"mtls": every gRPC and peer port asks for a certificate of the cluster's authority. "plaintext": none asks
    for anything, so everybody who can connect may do everything; only for loopback addresses."""
    directory: str = "certificates"
    """Where a daemon or client finds authority.crt and its own ROLE-ID.crt and .key; relative to the configuration
    file."""


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """Sessions of workers with the leader. All masters must agree."""

    heartbeat_s: float = 0.5
    session_lease_s: float = 10.0
    """At least three heartbeats."""
    suspect_s: float = 1.5
    """A worker not heard for so long loses its primaries; at least two heartbeats, less than the lease."""
    lease_margin: float = 1.25
    """The leader counts a lease so many times longer than the worker does; at least 1.25."""


@dataclass(frozen=True, slots=True)
class PlacementSettings:
    """Where shards and jobs belong. All masters must agree."""

    shards: int = 256
    """Shards that a new cluster is cut into."""
    replicas: int = 2
    """Workers that hold each shard, in a new cluster; later `clusterctl` changes it."""
    tokens_per_weight: int = 256
    """Points on the ring per unit of weight."""
    load_bound: float = 1.10
    """No worker takes more than so many times its fair share (Mirrokni et al. 2018); above 1."""
    cron_backups: int = 2
    """Backups per cron job."""
    moves_max: int = 16
    """Moves at once in the cluster."""
    moves_in_max: int = 4
    """Moves at once into one worker."""
    moves_out_max: int = 4
    """Moves at once out of one worker."""
    round_key_share_max: float = 0.25
    """Share of the key space that may be moving at once for balance."""
    hold_s: float = 30.0
    """How long the place of a lost worker is kept before its shards are copied elsewhere."""
    dwell_s: float = 60.0
    """How long a moved shard stays before balance may move it again."""
    users_max: int = 1_200
    """A shard with more users is cut in two."""
    merge_below_users: int = 400
    """Two neighbours with fewer users together become one shard; 0 for never. At most half of users_max."""
    merge_after_s: float = 600.0
    """How long they must have been so small."""
    reshapes_max: int = 1
    """Cuts and joins of shards at once in the cluster."""
    memory_percent_max: float = 80.0
    """A worker whose machine uses more of its memory gives shards to workers with room; 100 for never."""


@dataclass(frozen=True, slots=True)
class MoveSettings:
    """Deadlines of moves. All masters must agree."""

    copy_deadline_s: float = 3600.0
    """A copy that takes longer is rolled back."""
    copy_stall_s: float = 20.0
    """So is one whose receiver has taken nothing for so long; other workers come first for a while."""
    cede_deadline_s: float = 5.0
    """An old primary that does not cede within this has its move rolled back."""
    quarantine_workers: int = 3
    """A shard that loses so many different workers, each while it was primary, is quarantined; 0 for never."""
    quarantine_window_s: float = 600.0
    """Within so many seconds."""


@dataclass(frozen=True, slots=True)
class StateSettings:
    """Users' state and its replication. All masters and workers must agree."""

    replica_lease_s: float = 1.5
    """How long a replica lets its primary answer reads without asking; a promoted replica waits it out. Below
    session.session_lease_s."""
    lagging_s: float = 3.0
    """An in-sync replica that has not acknowledged what it was sent for so long is taken out. Writes wait that long."""
    opening_s: float = 8.0
    """The same for one that says that it is still opening its store, where it is longer."""
    min_in_sync: int = 1
    """Writes of a shard with fewer in-sync replicas are refused, and acknowledged only on so many."""
    user_keys_max: int = 10_000
    """Keys that one user may keep."""
    user_bytes_max: int = 67_108_864
    """Bytes of keys and values that one user may keep."""
    value_bytes_max: int = 1_048_576
    """Largest value; at most user_bytes_max."""
    remembered_s: float = 3600.0
    """How long a write's request id is remembered: a retry within that time applies once."""
    log_records_kept: int = 10_000
    """Records that a shard's log keeps, for replicas that come back."""
    forget_s: float = 300.0
    """How long a worker keeps the files of a shard that it gave up."""
    scrub_s: float = 86_400.0
    """How long a worker takes to check all that its shards have on disk, again and again; 0 for never."""


@dataclass(frozen=True, slots=True)
class CronSettings:
    """Cron jobs. All masters must agree."""

    launches_kept: int = 200
    """Launches that are kept per job."""
    launches_kept_s: float = 7_776_000.0
    """How long they are kept; the latest of a job always is."""
    catch_up_per_s: float = 10.0
    """Launches per second that all catch-ups together start at most."""
    order_timeout_s: float = 5.0
    """A launch whose worker did not confirm the start for so long goes to a backup."""
    jobs: tuple[CronJobSpec, ...] = ()
    """Jobs of the configuration: applied when a leader starts, unless the API has changed them since."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """One worker: what this process chooses for itself."""

    id: str = ""
    zone: str = ""
    weight: float = 1.0
    grpc_address: str = "127.0.0.1:0"
    http_address: str = "127.0.0.1:0"
    labels: tuple[tuple[str, str], ...] = ()
    launches_max: int = 16
    """Launches that run at once; orders beyond are declined."""
    output_bytes_max: int = 1_024
    """Last bytes of a launch's output that are reported."""
    run_output_bytes_max: int = 1_048_576
    """Bytes of a run's output that the worker keeps for `clusterctl cron logs`: its beginning and its end."""
    runs_output_bytes_max: int = 268_435_456
    """Bytes of all runs' outputs that the worker keeps; the oldest go first."""
    stop_grace_s: float = 5.0
    """Time between asking a run to stop and killing it; what the application's on_released may take."""
    application: str = ""
    """A class that is told which shards this worker serves, "package.module:Class"; empty for none."""


@dataclass(frozen=True, slots=True)
class LoggingSettings:
    """Logs of one process, to standard error."""

    level: str = "info"
    """"debug", "info", "warning" or "error"."""
    format: str = "text"
    """"text" or "json"."""


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Everything that cluster.toml says."""

    name: str = "cluster"
    """Daemons of clusters with other names are refused."""
    data_directory: str = "data"
    """Each daemon keeps its files in a folder of its own id below this; relative to the configuration file."""
    masters: tuple[MasterSettings, ...] = ()
    """Sorted by id; one, three or five."""
    raft: RaftSettings = field(default_factory=RaftSettings)
    discovery: DiscoverySettings = field(default_factory=DiscoverySettings)
    security: SecuritySettings = field(default_factory=SecuritySettings)
    session: SessionSettings = field(default_factory=SessionSettings)
    placement: PlacementSettings = field(default_factory=PlacementSettings)
    moves: MoveSettings = field(default_factory=MoveSettings)
    state: StateSettings = field(default_factory=StateSettings)
    cron: CronSettings = field(default_factory=CronSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    """Defaults of every worker."""
    workers: tuple[WorkerSettings, ...] = ()
    """Workers with settings of their own, sorted by id; what they leave out comes from `worker`."""

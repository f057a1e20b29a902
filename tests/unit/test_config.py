"""cluster.toml: what is read, what is refused, and how a person is told."""

from __future__ import annotations

import dataclasses
import enum
import tomllib
from pathlib import Path
from typing import get_type_hints

import pytest

from coordinator.config import ClusterConfig, ConsulSettings, DiscoverySettings, MasterSettings, WorkerSettings
from coordinator.config_file import (
    check_address,
    check_job_spec,
    describe_defaults,
    load,
    master_settings,
    parse,
    render,
    validate,
    worker_settings,
)
from coordinator.configuration.addresses import is_loopback
from coordinator.configuration.limits import CHOICES, RANGES
from coordinator.configuration.parse import SECTIONS
from coordinator.model import CatchUpPolicy, CronJobSpec, OverlapPolicy, RetryPolicy
from coordinator.model.errors import ConfigError
from tools.lib.local_cluster import make_config

REFERENCE = Path(__file__).resolve().parents[2] / "cluster.toml"

MASTER = """\
[masters.m1]
grpc_address = "127.0.0.1:7101"
peer_address = "127.0.0.1:7151"
http_address = "127.0.0.1:7201"
"""


def problems_of(text: str) -> list[str]:
    """What is wrong with a text; empty when it is accepted."""
    try:
        parse(text, "cluster.toml")
    except ConfigError as error:
        return error.problems
    return []


def valid_config() -> ClusterConfig:
    """A configuration built in code that keeps all rules."""
    return parse(MASTER, "cluster.toml")


def test_reference_names_every_option_with_its_default() -> None:
    """The reference file has each option of the settings classes, with the default that the classes have."""
    document = tomllib.loads(REFERENCE.read_text())
    defaults = describe_defaults()
    for dotted, default in defaults.items():
        path = dotted.split(".")
        place: object = document["cron"]["jobs"][0] if path[:2] == ["cron", "jobs"] else document
        for name in path[2:] if path[:2] == ["cron", "jobs"] else path:
            assert isinstance(place, dict)
            if name == "command":
                # Exclusive with `python`, so it can only stand in the comment.
                assert 'command = ["program"' in REFERENCE.read_text()
                break
            assert name in place, f"cluster.toml lacks {dotted}"
            place = place[name]
        else:
            if path[-1] in ("python", "priority"):
                continue
            expected = default.name.lower() if isinstance(default, enum.Enum) else default
            assert (tuple(place) if isinstance(place, dict) else place) == expected, dotted


def test_http_listens_on_loopback_unless_told_otherwise() -> None:
    """Health and metrics are plain text for everybody who reaches them: the defaults let nobody else in."""
    reference = parse(REFERENCE.read_text(), "cluster.toml")
    made = make_config(5, 3)
    for config in (reference, made):
        workers = (config.worker, *config.workers)
        addresses = [one.http_address for one in config.masters] + [one.http_address for one in workers]
        assert all(map(is_loopback, addresses))
    assert is_loopback(WorkerSettings("w").http_address)


def test_reference_explains_every_option() -> None:
    """Each option of the reference file stands below a comment, or below another option that shares its comment."""
    previous, inside_jobs, unexplained = "", False, []
    for line in REFERENCE.read_text().splitlines():
        inside_jobs = inside_jobs or 'id = "loop_02"' in line
        is_option = "=" in line and not line.startswith("#")
        if is_option and not inside_jobs and not previous.startswith("#") and "=" not in previous:
            unexplained.append(line)
        previous = line
    addresses = [line for line in unexplained if not line.startswith(("grpc_address", "id ="))]
    assert addresses == []


def test_reference_is_the_quickstart_table() -> None:
    """The reference file has three masters on the documented ports and the fifteen loops of the specification."""
    config = load(REFERENCE)
    assert [master.grpc_address for master in config.masters] == [f"127.0.0.1:{port}" for port in (7101, 7102, 7103)]
    assert [master.peer_address for master in config.masters] == [f"127.0.0.1:{port}" for port in (7151, 7152, 7153)]
    assert [master.http_address for master in config.masters] == [f"127.0.0.1:{port}" for port in (7201, 7202, 7203)]
    assert [job.id for job in config.cron.jobs] == [f"loop_{number:02}" for number in range(1, 16)]
    assert [job.priority_class for job in config.cron.jobs] == [3] * 2 + [4] * 4 + [5] * 9
    assert {job.python for job in config.cron.jobs} == {"worker_agent.loops:run"}
    assert config.cron.jobs[13].schedule == "0 0 * * 0"


def test_every_number_has_a_range_and_every_choice_exists() -> None:
    """No number of any settings class is without limits, and no limit is for a field that does not exist."""
    for kind in {*SECTIONS.values(), ConsulSettings, CronJobSpec}:
        hints = {field.name: get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}
        numbers = {name for name, hint in hints.items() if hint in (int, float)}
        assert numbers == set(RANGES.get(kind, {})), kind
        assert set(CHOICES.get(kind, {})) <= {name for name, hint in hints.items() if hint is str}, kind


CONFLICTS = [
    pytest.param(
        "[raft]\nelection_timeout_s_min = 0.3\nappend_period_s = 0.2",
        "cluster.toml:7: raft.append_period_s = 0.2 is more than a third of "
        "raft.election_timeout_s_min = 0.3 (line 6); use at most 0.1",
        id="append-period",
    ),
    pytest.param(
        "[raft]\nelection_timeout_s_min = 0.12",
        "cluster.toml:6: raft.append_period_s = 0.05 (the default) is more than a third of "
        "raft.election_timeout_s_min = 0.12 (line 6); use at most 0.04",
        id="append-period-by-default",
    ),
    pytest.param(
        "[raft]\nelection_timeout_s_max = 0.3",
        "cluster.toml:6: raft.election_timeout_s_max = 0.3 is not above "
        "raft.election_timeout_s_min = 0.3 (the default); use about 0.6",
        id="election-timeouts",
    ),
    pytest.param(
        "[raft]\nleader_fallback_s = 0.5", "cluster.toml:6: raft.leader_fallback_s = 0.5 is below", id="fallback"
    ),
    pytest.param(
        "[raft]\nclock_offset_max_s = 0.4",
        "cluster.toml:6: raft.clock_offset_max_s = 0.4 is not above "
        "raft.clock_offset_warn_s = 0.5 (the default); use about 5, so that people hear of it before",
        id="clocks",
    ),
    pytest.param(
        "[session]\nheartbeat_s = 0.5\nsession_lease_s = 1.4\nsuspect_s = 1.2\n[state]\nreplica_lease_s = 1",
        "cluster.toml:7: session.session_lease_s = 1.4 is less than three times "
        "session.heartbeat_s = 0.5 (line 6); use at least 1.5",
        id="lease",
    ),
    pytest.param(
        "[session]\nsuspect_s = 0.9",
        "cluster.toml:6: session.suspect_s = 0.9 is less than twice session.heartbeat_s = 0.5 (the default)",
        id="suspect-heartbeats",
    ),
    pytest.param(
        "[session]\nsuspect_s = 10",
        "cluster.toml:6: session.suspect_s = 10.0 is not below session.session_lease_s = 10.0 (the default)",
        id="suspect-lease",
    ),
    pytest.param(
        "[session]\nlease_margin = 1.2", "session.lease_margin = 1.2 is too small; use 1.25 to 10", id="margin"
    ),
    pytest.param("[placement]\nload_bound = 1", "placement.load_bound = 1.0 is too small", id="load-bound"),
    pytest.param(
        "[placement]\nmoves_in_max = 20",
        "placement.moves_in_max = 20 is above placement.moves_max = 16 (the default); use at most 16",
        id="moves",
    ),
    pytest.param(
        "[state]\nreplica_lease_s = 10",
        "cluster.toml:6: state.replica_lease_s = 10.0 is not below session.session_lease_s = 10.0 (the default)",
        id="replica-lease",
    ),
    pytest.param(
        "[state]\nmin_in_sync = 3",
        "cluster.toml:6: state.min_in_sync = 3 is above placement.replicas = 2 (the default), so that every write "
        "would be refused; use at most 2",
        id="min-in-sync",
    ),
    pytest.param(
        "[state]\nuser_bytes_max = 2000",
        "state.value_bytes_max = 1048576 (the default) is above state.user_bytes_max = 2000 (line 6)",
        id="value-bytes",
    ),
    pytest.param("[moves]\ncopy_deadline_s = 2", "moves.cede_deadline_s = 5.0 (the default) is above", id="cede"),
    pytest.param(
        "[discovery.consul]\ncheck_timeout_s = 3",
        "discovery.consul.check_timeout_s = 3.0 is above discovery.consul.check_interval_s = 2.0",
        id="check-timeout",
    ),
    pytest.param(
        '[discovery.consul]\nworker_service = "coordinator"', "is also the name of the masters", id="service-names"
    ),
    pytest.param(
        '[workers.w1]\ngrpc_address = "localhost:7151"',
        'cluster.toml:6: workers.w1.grpc_address = "localhost:7151" is taken by '
        'masters.m1.peer_address = "127.0.0.1:7151" (line 3); use another port',
        id="one-port",
    ),
    pytest.param(
        '[worker]\nhttp_address = "127.0.0.1:9000"\n[workers.w1]\n[workers.w2]',
        'workers.w2.http_address = "127.0.0.1:9000" (the default) is taken by workers.w1.http_address',
        id="inherited-port",
    ),
    pytest.param("[workers.M1]\nweight = 2", "workers.M1 has the id of masters.m1, and its data folder", id="one-id"),
]


@pytest.mark.parametrize(("text", "expected"), CONFLICTS)
def test_conflicts_name_both_values(text: str, expected: str) -> None:
    """Options that do not fit together are refused with the line, both values, and what would be right."""
    problems = problems_of(MASTER + text)
    assert len(problems) == 1, problems
    assert expected in problems[0]


SINGLE_FAULTS = [
    pytest.param("[raft]\nelection_timeout_min = 1", "unknown key raft.election_timeout_min; did you mean", id="key"),
    pytest.param("[rafft]", "cluster.toml:5: unknown section rafft; did you mean raft?", id="section"),
    pytest.param(
        "[raft]\nproposals_max = 1.5", "proposals_max = 1.5 is a number with a fraction; use a whole", id="whole"
    ),
    pytest.param("[raft]\nproposals_max = true", "proposals_max = true is a yes or no; use a whole", id="bool"),
    pytest.param("[raft]\nproposals_max = 0", "proposals_max = 0 is too small; use 1 to 1000000 proposals", id="range"),
    pytest.param("[raft]\nappend_period_s = nan", "is not a finite number; use a number", id="nan"),
    pytest.param("[raft]\nappend_period_s = 1979-05-27", "is a date or time; use a number", id="date"),
    pytest.param("raft = 3", "raft = 3 is a whole number; make it a table: [raft]", id="section-type"),
    pytest.param("[cluster]\nname = 3", "cluster.name = 3 is a whole number; use text in quotes", id="text"),
    pytest.param('[cluster]\nname = "a b"', 'cluster.name = "a b" is not a name; use 1 to 63 letters', id="name"),
    pytest.param('[cluster]\ndata_directory = ""', 'cluster.data_directory = "" is not a folder', id="folder"),
    pytest.param('[discovery]\nbackend = "zk"', '"zk" is not known; use "embedded" or "consul"', id="choice"),
    pytest.param('[logging]\nlevel = "loud"', 'logging.level = "loud" is not known', id="level"),
    pytest.param('[worker]\nzone = "a b"', 'worker.zone = "a b" is not a zone', id="zone"),
    pytest.param('[worker]\napplication = "a.b"', 'worker.application = "a.b" is not a class; use', id="application"),
    pytest.param("[worker]\nlabels = { a = 1 }", "is a table with values of another type", id="labels"),
    pytest.param('[worker]\nid = "w1"', "unknown key worker.id", id="worker-id"),
    pytest.param("[workers.w1]\nweight = -1", "cluster.toml:6: workers.w1.weight = -1.0 is too small", id="weight"),
    pytest.param('[workers."a b"]', 'workers."a b" has no usable id', id="id-of-worker"),
    pytest.param('[worker]\ngrpc_address = "0.0.0.0:1"', "nobody can connect to it", id="unspecified"),
    pytest.param("[cron]\njobs = 3", "write [[cron.jobs]] before each job", id="jobs"),
    pytest.param(
        "[[cron.jobs]]\nid = 'a'\npython = 'a:b'", "cluster.toml:5: cron.jobs[0] has no schedule", id="missing"
    ),
]


@pytest.mark.parametrize(("text", "expected"), SINGLE_FAULTS)
def test_faults_of_one_option_are_told(text: str, expected: str) -> None:
    """One fault gives one line that names the key, the value and what would be right."""
    # Keys of the root have to come before the first table.
    problems = problems_of(text + "\n" + MASTER if text.startswith("raft =") else MASTER + text)
    assert len(problems) == 1, problems
    assert expected in problems[0]
    assert problems[0].startswith("cluster.toml:")


JOB_FAULTS = [
    ({"schedule": "* * * *"}, "is not a cron expression: it has 4 fields; use five fields"),
    ({"schedule": "61 * * * *"}, "schedule = \"61 * * * *\" is not a cron expression: bad minute \"61\"; use 0 to 59"),
    ({"schedule": "0 0 30 2 *"}, "is not a cron expression: bad day-of-month"),
    ({"schedule": "@every 5"}, 'schedule = "@every 5" has no interval of whole hours, minutes and seconds'),
    ({"time_zone": "Mars/Olympus"}, 'time_zone = "Mars/Olympus" is not an IANA time zone'),
    ({"time_zone": "../etc/passwd"}, "is not an IANA time zone"),
    ({"time_zone": ""}, "is not an IANA time zone"),
    ({"python": "", "command": ()}, "has neither command nor python"),
    ({"command": ("true",)}, "has both command and python"),
    ({"python": "", "command": ("", "x")}, "names no program"),
    ({"python": "package.module.function"}, 'use "package.module:function"'),
    ({"python": "9a:b"}, 'use "package.module:function"'),
    ({"environment": (("A=B", "c"),)}, "use a name without = and NUL"),
    ({"priority_class": 7}, "priority = 7 is too large; use 0 to 6"),
    ({"timeout_s": 0.0}, "timeout_s = 0.0 is too small"),
    ({"attempts_max": 0}, "attempts_max = 0 is too small; use 1 to 100 attempts"),
    ({"id": "a/b"}, 'id = "a/b" is not a name'),
    ({"id": "a b"}, 'id = "a b" is not a name'),
    ({"python": "", "command": ("a\0b",)}, "names no program"),
    ({"catch_up_limit": 0}, "catch_up_limit = 0 is too small; use 1 to 1000"),
    ({"start_deadline_s": 0.0}, "start_deadline_s = 0.0 is too small"),
    ({"timeout_s": float("nan")}, "timeout_s = nan"),
    ({"schedule": "0 " + ",".join(["0"] * 200) + " * * *"}, "at most 256 are allowed"),
]


@pytest.mark.parametrize(("changes", "expected"), JOB_FAULTS)
def test_job_faults_are_told_to_the_api_too(changes: dict[str, object], expected: str) -> None:
    """`check_job_spec` holds a job that came in through the API to the rules of the file."""
    spec = CronJobSpec(id="job", schedule="*/5 * * * *", python="package.module:function")
    assert check_job_spec(spec) == []
    problems = check_job_spec(dataclasses.replace(spec, **changes))  # type: ignore[arg-type]
    assert len(problems) == 1, problems
    assert expected in problems[0]


def test_job_of_the_file_takes_every_option() -> None:
    """Words of a job become the enums and classes of the model; six fields of a schedule are accepted."""
    text = """
[[cron.jobs]]
id = "job"
schedule = "*/10 * * * * *"
time_zone = "Europe/Berlin"
priority = "p2"
command = ["echo", "hello"]
environment = { B = "2", A = "1" }
overlap = "allow"
catch_up = "all"
retry = "never"
timeout_s = 3
"""
    job = parse(MASTER + text, "cluster.toml").cron.jobs[0]
    assert job == CronJobSpec(
        id="job",
        schedule="*/10 * * * * *",
        time_zone="Europe/Berlin",
        priority_class=2,
        command=("echo", "hello"),
        environment=(("A", "1"), ("B", "2")),
        overlap=OverlapPolicy.ALLOW,
        catch_up=CatchUpPolicy.ALL,
        retry=RetryPolicy.NEVER,
        timeout_s=3.0,
    )


def test_all_faults_are_reported_in_order() -> None:
    """A file with several faults gives all of them at once, in the order of their lines."""
    text = """\
[masters.m1]
grpc_address = "127.0.0.1:7101"
peer_address = "127.0.0.1:7101"
http_address = "nowhere"
[masters.m2]
grpc_address = "[::1]:7102"
peer_address = "::1:7152"
[raft]
append_period_s = "fast"
snapshots = 3
[[cron.jobs]]
id = "a"
schedule = "* * * * *"
python = "a:b"
[[cron.jobs]]
id = "a"
schedule = "* * *"
python = "a:b"
"""
    problems = problems_of(text)
    assert [problem.split(":")[1] for problem in problems] == ["1", "3", "4", "5", "7", "9", "10", "16", "17"]
    assert "there are 2 masters (m1, m2); use one, three or five" in problems[0]
    assert 'cron.jobs[1].id = "a" is already cron.jobs[0].id = "a" (line 12); use another' in problems[7]


@pytest.mark.parametrize(
    ("text", "line"),
    [("a = 1\nb = \n", 2), ("[raft\n", 1), ('[raft]\na = """x\n\n', 3), ("x = 1\nx = 2\n", 2), ("k = 09", 1)],
)
def test_syntax_errors_name_the_line(text: str, line: int) -> None:
    """A text that is not TOML is refused in one line with its place."""
    problems = problems_of(text)
    assert len(problems) == 1
    assert problems[0].startswith(f"cluster.toml:{line}: is not valid TOML")


def test_unreadable_files_are_told(tmp_path: Path) -> None:
    """A missing file, a directory and bytes that are no text are refused in one line each."""
    bad = tmp_path / "bad.toml"
    bad.write_bytes(b"[cluster]\nname = '\xff'\n")
    for path, expected in (
        (tmp_path / "none.toml", "no such file"),
        (tmp_path, "cannot be read"),
        (bad, ":2: is not UTF-8"),
    ):
        with pytest.raises(ConfigError, match=expected) as raised:
            load(path)
        assert len(raised.value.problems) == 1


def test_load_resolves_the_folder_and_hides_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative data folder is beside the file; the token comes from the environment first and is never shown."""
    path = tmp_path / "cluster.toml"
    path.write_text(f'\ufeff{MASTER}[discovery.consul]\ntoken = "from-the-file"\n', encoding="utf-8")
    monkeypatch.delenv("CONSUL_HTTP_TOKEN", raising=False)
    config = load(path)
    assert config.data_directory == str(tmp_path.resolve() / "data")
    assert config.discovery.consul.token == "from-the-file"
    assert "from-the-file" not in repr(config)
    assert "from-the-file" in render(config)
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "from-the-environment")
    config = load(path)
    assert config.discovery.consul.token == "from-the-environment"
    assert "from-the" not in render(config)
    path.write_text(MASTER + "[discovery.consul]\ntoken = 12345\n")
    with pytest.raises(ConfigError, match=r"token = \(hidden\) is a whole number"):
        load(path)


def test_workers_inherit_what_they_leave_out() -> None:
    """A worker's own table comes before [worker]; labels of both are joined; an unlisted worker gets the defaults."""
    text = '[worker]\nweight = 2\nzone = "a"\nlabels = { x = "1", y = "1" }\n'
    text += '[workers.w1]\nzone = "b"\nlabels = { y = "2" }\n'
    config = parse(MASTER + text, "cluster.toml")
    assert worker_settings(config, "w1") == WorkerSettings(
        id="w1", weight=2.0, zone="b", labels=(("x", "1"), ("y", "2"))
    )
    assert worker_settings(config, "w2") == WorkerSettings(
        id="w2", weight=2.0, zone="a", labels=(("x", "1"), ("y", "1"))
    )
    for bad in ("a b", "m1", "W1"):
        with pytest.raises(ConfigError):
            worker_settings(config, bad)


def test_master_settings_name_the_known_ones() -> None:
    """Asking for a master that is not in the table says which ones are."""
    config = valid_config()
    assert master_settings(config, "m1") is config.masters[0]
    with pytest.raises(ConfigError, match="'m9' is not a master of this configuration; use one of m1"):
        master_settings(config, "m9")


def test_validate_holds_code_to_the_same_rules() -> None:
    """A configuration built in code is refused like one from a file, without lines."""
    config = valid_config()
    validate(config)
    raft = dataclasses.replace(config.raft, append_period_s=0.2)
    masters = (*config.masters, MasterSettings("m2", "a:1", "a:2", "a:0"))
    with pytest.raises(ConfigError) as raised:
        validate(dataclasses.replace(config, raft=raft, masters=masters))
    assert raised.value.problems == [
        "raft.append_period_s = 0.2 is more than a third of raft.election_timeout_s_min = 0.3; use at most 0.1",
        'masters.m2.http_address = "a:0" has no usable port; use a port from 1 to 65535',
        "there are 2 masters (m1, m2); use one, three or five tables [masters.ID]: an even number survives no more "
        "faults than the odd number below it",
    ]


@pytest.mark.parametrize("complete", [False, True])
def test_rendered_text_reads_back(complete: bool) -> None:
    """What `render` writes is read as the same settings, in short and in full."""
    config = load(REFERENCE)
    odd = dataclasses.replace(
        config,
        data_directory='C:\\data "1"\t\x7f',
        discovery=DiscoverySettings(backend="consul", consul=ConsulSettings(address="[::1]:8500", token="t")),
        workers=(WorkerSettings(id="w.1", weight=1e-1, labels=(("a b", "\n"),)), WorkerSettings(id="w2", zone="z")),
    )
    for each in (config, odd):
        assert parse(render(each, complete=complete), "cluster.toml") == each


@pytest.mark.parametrize(
    ("address", "good"),
    [
        ("127.0.0.1:1", True),
        ("host-1.example.org:65535", True),
        ("[::1]:80", True),
        ("localhost:080", True),
        ("::1:80", False),
        ("host", False),
        (":80", False),
        ("host:", False),
        ("host:0", False),
        ("host:65536", False),
        ("host:-1", False),
        ("host:8o", False),
        ("256.1.1.1:80", False),
        ("0.0.0.0:80", False),
        ("[::]:80", False),
        ("ho st:80", False),
        ("http://host:80", False),
        ("[host]:80", False),
    ],
)
def test_addresses(address: str, good: bool) -> None:
    """An address is a host that others can reach and a port."""
    assert (check_address(address) is None) is good

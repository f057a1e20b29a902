"""Jobs that ask for a folder, a user or limits: real processes, through the launcher."""

from __future__ import annotations

import os
import pwd
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordinator.api.v1 import session_pb2, types_pb2
from tests.unit.test_launcher import FAILED, SUCCEEDED, Desk, order_of, script
from worker_agent import launch_command, run_limited
from worker_agent.launch_command import arguments_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="users and limits of POSIX")
needs_root = pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="only root may act as another user")


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """A launcher that runs, and is stopped at the end."""
    desk = Desk(tmp_path / "data")
    await desk.launcher.start()
    yield desk
    await desk.launcher.stop(0.1)


async def result_of(desk: Desk, order: session_pb2.LaunchOrder) -> session_pb2.LaunchReport:
    """Runs an order to its end."""
    await desk.launcher.launch(order)
    return await desk.final(order)


def test_a_job_that_asks_for_nothing_is_started_as_it_is() -> None:
    """Only jobs that ask for something go through run_limited.py."""
    assert arguments_of(types_pb2.CronJobSpec(command=["true", "x"])) == ["true", "x"]
    spec = types_pb2.CronJobSpec(command=["true", "x"], open_files_max=7, working_directory="/tmp")
    assert arguments_of(spec)[4:] == ["--files", "7", "--directory", "/tmp", "--", "true", "x"]


async def test_a_run_starts_in_its_folder(desk: Desk, tmp_path: Path) -> None:
    """The folder is the run's, for commands and for Python callables, and PWD says so."""
    order = script("import os; print(os.getcwd(), os.environ['PWD'])", working_directory=str(tmp_path))
    result = await result_of(desk, order)
    assert result.output.decode().split() == [str(tmp_path)] * 2
    module = "import os\ndef run(): print(os.getcwd())\n"
    (tmp_path / "in_folder.py").write_text(module, encoding="utf-8")
    order = order_of(python="in_folder:run", at=2, working_directory=str(tmp_path))
    result = await result_of(desk, order)
    assert (result.state, result.output.decode().strip()) == (SUCCEEDED, str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"working_directory": "/nowhere"}, "its folder '/nowhere' cannot be used: No such file or directory"),
        ({"user": "nobody-of-that-name"}, "there is no user 'nobody-of-that-name' on this machine"),
    ],
)
async def test_what_cannot_be_had_is_one_line(desk: Desk, fields: dict[str, str], reason: str) -> None:
    """The launch has FAILED with exit status 127, as for a missing program, and one line says what is missing."""
    result = await result_of(desk, order_of("/bin/echo", "never", **fields))  # type: ignore[arg-type]
    assert (result.state, result.exit_status) == (FAILED, 127)
    assert result.reason == f"could not start '/bin/echo': {reason}"
    assert result.output.decode() == f"{result.reason}\n"


async def test_a_program_that_is_missing_says_so_there_too(desk: Desk) -> None:
    """With limits the program is looked for after they are set; the answer is the same."""
    result = await result_of(desk, order_of("/nowhere/program", open_files_max=50))
    assert (result.state, result.exit_status) == (FAILED, 127)
    assert result.reason == "could not start '/nowhere/program': No such file or directory"


HOG = "import sys\nprint('begun', flush=True)\nkept = b'x' * (512 << 20)\nprint('too much')"


async def test_a_memory_limit_stops_a_hog(desk: Desk) -> None:
    """A run that wants more memory than its limit does not get it, nor do its children; without a limit it does."""
    result = await result_of(desk, script(HOG, memory_bytes_max=200 << 20))
    assert result.state == FAILED
    assert b"MemoryError" in result.output
    assert b"too much" not in result.output
    child = f"import subprocess,sys; sys.exit(subprocess.call([sys.executable, '-c', {HOG!r}]))"
    result = await result_of(desk, script(child, at=2, memory_bytes_max=200 << 20))
    assert (result.state, b"too much" in result.output) == (FAILED, False)
    result = await result_of(desk, script(HOG.replace("512", "300"), at=3, memory_bytes_max=2 << 30))
    assert (result.state, b"too much" in result.output) == (SUCCEEDED, True)


async def test_a_processor_limit_stops_a_run_that_computes(desk: Desk) -> None:
    """At the end of its processor time a run is ended by the system."""
    result = await result_of(desk, script("while True: pass", processor_s_max=0.5))
    assert (result.state, result.reason) == (FAILED, "ended by SIGXCPU")


async def test_open_files_are_limited(desk: Desk) -> None:
    """A run gets no more files than its limit."""
    result = await result_of(desk, script("import os\nwhile True: os.dup(1)", open_files_max=20))
    assert result.state == FAILED
    assert b"Too many open files" in result.output


@needs_root
async def test_a_run_belongs_to_its_user(desk: Desk) -> None:
    """User, group and groups are the user's, HOME too, and there is no way back; the job's own variables stay."""
    nobody = pwd.getpwnam("nobody")
    source = "id -u; id -g; id -G; echo $HOME $USER $MINE $LAUNCH_TOKEN; cd /root && echo root"
    result = await result_of(desk, order_of("/bin/sh", "-c", source, user="nobody", environment={"MINE": "yes"}))
    uid, gid, groups, told, *rest = result.output.decode().splitlines()
    assert (int(uid), int(gid)) == (nobody.pw_uid, nobody.pw_gid)
    assert [int(group) for group in groups.split()] == sorted(os.getgrouplist("nobody", nobody.pw_gid))
    assert told.split() == [nobody.pw_dir, "nobody", "yes", "tick/1767268800000/1"]
    assert "root" not in rest


@needs_root
async def test_the_folder_is_entered_as_the_user(desk: Desk, tmp_path: Path) -> None:
    """A folder that only root may enter is none for the run of another user."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    result = await result_of(desk, order_of("/bin/echo", user="nobody", working_directory=str(closed)))
    assert result.exit_status == 127
    assert result.reason == f"could not start '/bin/echo': its folder {str(closed)!r} cannot be used: Permission denied"


@needs_root
async def test_a_worker_that_is_not_root_may_not_act_as_others(desk: Desk) -> None:
    """Without the right to it, the refusal says what it takes. (A run of nobody plays the worker.)"""
    # nobody may not read this Python's own files, so the source is read, and what it imports, before.
    order = script(
        "import math, os, pwd, resource, sys\n"
        f"source = open({run_limited.__file__!r}).read()\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.argv[1:] = ['--user', 'root', '--', '/bin/echo']\n"
        "exec(compile(source, 'run_limited', 'exec'), {'__name__': '__main__'})"
    )
    result = await result_of(desk, order)
    assert result.exit_status == 127
    assert result.output.decode() == (
        "could not start '/bin/echo': this worker may not act as user 'root'; that takes a worker that runs as root\n"
    )


async def test_other_systems_refuse_clearly(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no such limits, a job that asks for them is declined, and is not started without."""
    monkeypatch.setattr(launch_command, "IS_POSIX", False)
    result = await result_of(desk, script("print('never')", memory_bytes_max=1 << 30))
    assert (result.decline, result.state, result.output) == (session_pb2.LAUNCH_DECLINE_UNFIT, 0, b"")
    assert "memory_bytes_max, processor_s_max and open_files_max need a POSIX system" in result.reason
    assert (await result_of(desk, script("print('plain')", at=2))).state == SUCCEEDED

"""Ends the runs of a worker agent that was killed or stands still, once its session lease is over.

    python -I -S run_watchdog.py GRACE_S

The agent starts this beside itself, in a session of its own, and says in lines on standard input what is to be known:

    begin RUN_ID     a run starts now, with this id in its environment
    end RUN_ID       nothing of it is left
    lease SECONDS    the session lease ends then, on the machine's monotonic clock (`coordinator.model.clock`)
    bye              the agent stops, and no run is left

An input that ends without a goodbye means that the agent is gone (kill -9, out of memory). Its runs may go on until the
lease is over, as the leader gives them to nobody before; then they are asked to end, with all that they started, and
after GRACE_S killed, as the agent itself does. An agent that was started anew in the meantime has killed them already,
and what it runs has other ids, so the two never meet. Then this process ends, so it outlives its agent by no more than
lease and grace; signals that ask it to end before are ignored.

An agent that is there and stands still (SIGSTOP, a debugger, a bug) cannot end its runs either, and says nothing of a
longer lease. Half of GRACE_S after the end of the lease they are ended in the same way: an agent that lives has begun
with that itself by then, and the leader, who counts the lease longer by twice GRACE_S, gives them to nobody before it
is over. (Not on Windows, whose `select` knows no pipes.)

Nothing is imported but the standard library, and on Linux none of the site's packages: it costs 10 MB, 4 of them its
own, and what it needs when the machine is out of memory it has already. Other systems have no /proc, so psutil looks
there.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

HAS_PROC = sys.platform == "linux"
RUN_ID_VARIABLE = "LAUNCH_RUN_ID"
"""In the environment of whatever belongs to a run; here, as run_finder.py needs psutil."""
LISTEN_S = 1.0
"""How long it sleeps at most: its sleeps stand still while the machine sleeps, and leases do not."""
LOOK_S = 0.1
"""How often it looks whether what was asked to end has ended."""
READ_BYTES = 1 << 16
LOOKS_MAX = 100
"""Something that respawns faster than it can be killed shall not keep this process for ever."""
_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", None)


class Told:
    """What the agent has said. (Not a dataclass: their module alone would cost 2 MB.)"""

    def __init__(self) -> None:
        self.runs: set[str] = set()
        self.lease_until_s = float("-inf")
        self.is_goodbye = False
        self._acted_on_s = float("-inf")

    def hung_in_s(self, now_s: float, late_s: float) -> float:
        """How long until the agent, which may be late, surely stands still; without end where it need say nothing."""
        has_lease = self.lease_until_s > self._acted_on_s
        return self.lease_until_s + late_s - now_s if self.runs and has_lease else float("inf")

    def acted(self) -> None:
        """What ran under this lease was ended."""
        self._acted_on_s = self.lease_until_s

    def take(self, line: bytes) -> None:
        """Takes the next line in."""
        verb, _, subject = line.decode("ascii").partition(" ")
        if verb == "begin":
            self.runs.add(subject)
        elif verb == "end":
            self.runs.discard(subject)
        elif verb == "lease":
            self.lease_until_s = float(subject)
        else:
            self.is_goodbye = True


def listen(descriptor: int, grace_s: float) -> Told:
    """Everything up to the end of the input. Ends what runs when the agent is found to stand still."""
    told, rest, late_s = Told(), b"", grace_s / 2
    while True:
        if os.name == "posix":
            hung_in_s = told.hung_in_s(now_s(), late_s)
            # What it has said by now is read first: it may have said it in time.
            if not select.select([descriptor], [], [], max(0.0, min(hung_in_s, LISTEN_S)))[0]:
                if hung_in_s <= 0.0:
                    say_ended("stands still", end_runs(told.runs, grace_s))
                    told.acted()
                continue
        data = os.read(descriptor, READ_BYTES)
        if not data:
            return told
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            told.take(line)


def now_s() -> float:
    """The clock on which the agent counts leases: seconds of sleep count too."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


def await_moment(moment_s: float) -> None:
    """Returns when it has come, by a clock that goes on in the machine's sleep, as sleeps of this process do not."""
    while (left_s := moment_s - now_s()) > 0:
        time.sleep(min(left_s, 1.0))


def end_runs(run_ids: set[str], grace_s: float) -> int:
    """Asks all that belongs to these runs to end, kills what has not after the grace; the number of processes."""
    members = find(run_ids)
    asked = set(members)
    for member in members:
        send(member, signal.SIGTERM)
    deadline_s = now_s() + grace_s
    while members and (left_s := deadline_s - now_s()) > 0:
        time.sleep(min(left_s, LOOK_S))
        members = find(run_ids)
    for _ in range(LOOKS_MAX):  # A process that forks while it is killed leaves one more.
        members = find(run_ids)
        if not members:
            break
        asked |= set(members)
        for member in members:
            send(member, getattr(signal, "SIGKILL", signal.SIGTERM))
        time.sleep(LOOK_S)
    return len(asked)


Member = tuple[int, float]
"""A process's number, and when it was started: a number that was given out again is another process."""


def find(run_ids: set[str]) -> list[Member]:
    """The living processes that have one of these ids in their environment, and those below them."""
    table = _table_of_proc() if HAS_PROC else _table_of_psutil()
    children: dict[int, list[int]] = {}
    for number, (parent, _, _) in table.items():
        children.setdefault(parent, []).append(number)
    below = [number for number, (_, _, run_id) in table.items() if run_id in run_ids]
    found: dict[int, float] = {}
    while below:
        number = below.pop()
        if number not in found:
            found[number] = table[number][1]
            below += children.get(number, [])
    return list(found.items())


def send(member: Member, number: int) -> None:
    """Sends a signal, to this process and no other that has its number by now."""
    if not HAS_PROC:
        import psutil

        with contextlib.suppress(psutil.Error):
            process = psutil.Process(member[0])
            if process.create_time() == member[1]:
                process.send_signal(number)
        return
    with contextlib.suppress(OSError, ValueError):
        try:
            descriptor = os.pidfd_open(member[0])
        except ProcessLookupError:
            return
        except OSError:  # An old kernel, or a sandbox that does not know the call.
            if _state_of(member[0])[2] == member[1]:
                os.kill(member[0], number)
            return
        try:
            if _state_of(member[0])[2] == member[1]:
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


Table = dict[int, tuple[int, float, str]]
"""Of each living process its parent, its start, and the id of the run that it belongs to."""


def _table_of_proc() -> Table:
    table: Table = {}
    prefix = RUN_ID_VARIABLE.encode() + b"="
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with contextlib.suppress(OSError, ValueError):
            state, parent, started = _state_of(int(name))
            if state in "ZX":
                continue
            run_id = b""
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                entries = [entry for entry in file.read().split(b"\0") if entry.startswith(prefix)]
                run_id = entries[0].removeprefix(prefix) if entries else b""
            table[int(name)] = (parent, started, run_id.decode("ascii", errors="replace"))
    return table


def _state_of(number: int) -> tuple[str, int, float]:
    """A process's state, parent and start. Raises OSError and ValueError."""
    with open(f"/proc/{number}/stat", "rb") as file:
        # What follows the program's name, which may have brackets and spaces of its own.
        fields = file.read().rpartition(b")")[2].split()
    if len(fields) < 20:
        raise ValueError(number)
    return fields[0].decode("ascii"), int(fields[1]), float(fields[19])


def _table_of_psutil() -> Table:
    import psutil

    table: Table = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            run_id = ""
            with contextlib.suppress(psutil.Error, OSError):
                run_id = process.environ().get(RUN_ID_VARIABLE, "")
            table[process.pid] = (process.ppid(), process.create_time(), run_id)
    return table


def main(arguments: list[str]) -> int:
    """Returns when the agent has stopped, or when what it left has ended."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.chdir(os.path.abspath(os.sep))  # The agent's folder may be removed or unmounted.
    grace_s = float(arguments[0])
    told = listen(sys.stdin.fileno(), grace_s)
    if told.is_goodbye or not told.runs:
        return 0
    await_moment(told.lease_until_s)
    say_ended("is gone", end_runs(told.runs, grace_s))
    return 0


def say_ended(what_it_does: str, ended: int) -> None:
    """For people; nobody may be there to read it."""
    if ended:
        with contextlib.suppress(OSError):
            what = "one process" if ended == 1 else f"{ended} processes"
            sys.stderr.write(f"the worker agent {what_it_does}, and its lease is over: ended {what} of its runs\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

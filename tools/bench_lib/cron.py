"""Jobs of every second: how late they start, what is missed or doubled, how many start, what a killed leader costs.

Ours is a cluster at default settings: three masters commit the intent, another process, the worker, starts the run. The
peers are APScheduler, in one process and with its memory only, and Celery beat with a worker and a Redis. Their jobs
call a function in a process that is there; ours start a process, as cheap as can be (cron_ours.py). All tell the time
themselves when they begin.

- `lateness_ms`: from the due time until the run's own first instruction; 100 jobs of every second. `spread`: their due
  times lie all over the second (`jitter_s` = 1); `burst`: all at second zero. `killed`: kill -9 of the leader at half
  time; no peer has a second one.
- `recorded_lateness_ms`: the same by the history, which does not know how long a process takes to begin.
- `missed`, `doubled`: due times of these windows without a start, and starts beyond the first.
- `launches_per_s`: the most starts, with more and more jobs of every second until a system does not keep up. `played`:
  workers that only report, so that the leader is what limits; orders that left it, after the commit.
- `processor_ms_per_launch`: of each side, ours only, above what it uses without jobs.
- `first_launch_after_failover_s`: from kill -9 of the leader until the first run starts that became due without one.

Systems are measured one after the other. Lateness of Celery beat: see cron_celery.py.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools.bench_lib import cron_apscheduler
from tools.bench_lib.cron_celery import CelerySystem
from tools.bench_lib.cron_ours import OurCron, job_id, small, spec
from tools.bench_lib.cron_played import PlayedWorkers
from tools.bench_lib.cron_runs import NS_PER_S, Account, Run, account, first_after_s, most_per_s, per_s
from tools.bench_lib.result import OURS, Emit, Params, emit_quantiles
from tools.lib.debian_package import PackageError

STARTS = ("spread", "burst")
DOWN_S = 3.0
"""How long a killed leader stays away."""
ENDING_S = 2.0
"""For what was due at the end of a window to start."""
OVERDUE_S_MAX = 60.0
"""For what did not: a system that is behind misses nothing as long as it comes to it."""
RATE_WARM_UP_S = 3.0
IDLE_S = 5.0


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    jobs: int = 100
    seconds: int = 60
    rates: tuple[int, ...] = (100, 150, 200, 300, 400, 600, 800, 1_200, 1_600, 2_400)
    """How many jobs of every second are tried, until a system does not keep up."""
    rate_s: float = 6.0
    kills: int = 10


QUICK = Size(seconds=8, rates=(100, 400, 1_600), rate_s=4.0, kills=2)


def run(emit: Emit, size: Size | None = None) -> None:
    """Measures everything; about fourteen minutes."""
    size = size or Size()
    _ours(emit, size)
    _apscheduler(emit, size)
    try:
        _celery(emit, size)
    except PackageError as error:
        print(f"tools/bench: Celery is left out: {error}", file=sys.stderr)


def run_quick(emit: Emit) -> None:
    """Measures everything briefly, in about four minutes."""
    run(emit, QUICK)


def _in_directory(work: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="coordinator-bench-") as directory:
        work(Path(directory))


def _emit_account(emit: Emit, system: str, params: Params, found: Account) -> None:
    if found.lateness_ms:
        emit_quantiles(emit, system, "lateness_ms", "ms", params, found.lateness_ms)
        emit(system, "lateness_ms", max(found.lateness_ms), "ms", {**params, "of": "max"}, found.lateness_ms)
    emit(system, "missed", found.missed, "1", params)
    emit(system, "doubled", found.doubled, "1", params)


# Ours


def _ours(emit: Emit, size: Size) -> None:
    for start in STARTS:
        _in_directory(lambda directory, start=start: _our_lateness(emit, size, start, directory))  # type: ignore[misc]
    _in_directory(lambda directory: _our_failovers(emit, size, directory))
    _in_directory(lambda directory: _our_rate(emit, size, directory))
    _in_directory(lambda directory: asyncio.run(_played_rate(emit, size, directory)))


def _begin(system: OurCron, size: Size, start: str) -> dict[str, float]:
    """Jobs run; the processor seconds per second that each daemon used before there were any."""
    system.start()
    used_s = system.processor_s()
    time.sleep(IDLE_S)
    idle_share = {daemon_id: (used - used_s[daemon_id]) / IDLE_S for daemon_id, used in system.processor_s().items()}
    command = system.telling_command()
    jitter_s = 1.0 if start == "spread" else 0.0
    system.apply([spec(number, command, jitter_s) for number in range(size.jobs)])
    system.wait_running()
    return idle_share


def _our_lateness(emit: Emit, size: Size, start: str, directory: Path) -> None:
    jobs = [job_id(number) for number in range(size.jobs)]
    with OurCron(directory) as system:
        idle_share = _begin(system, size, start)
        for leader in ("steady", "killed"):
            from_s = int(time.time()) + 1
            used_before_s = system.processor_s()
            until_s = from_s + size.seconds
            if leader == "killed":
                time.sleep(size.seconds / 2)
                victim, _, _ = system.kill_leader()
                time.sleep(DOWN_S)
                system.bring_back(victim)
            time.sleep(max(0.0, until_s - time.time()))
            if leader == "steady":
                _emit_processor(emit, size, start, system, used_before_s, idle_share)
            system.wait_started(until_s, OVERDUE_S_MAX)
            params: Params = {"jobs": size.jobs, "start": start, "leader": leader}
            _emit_account(emit, OURS, params, account(system.runs(size.jobs), jobs, from_s, until_s))
            launches = [launch for job in jobs for launch in system.launches(job)]
            recorded = [
                float(launch.started_unix_ms - launch.due_unix_ms)
                for launch in launches
                if from_s * 1_000 <= launch.due_unix_ms < until_s * 1_000 and launch.started_unix_ms
            ]
            emit_quantiles(emit, OURS, "recorded_lateness_ms", "ms", params, recorded)


def _emit_processor(
    emit: Emit, size: Size, start: str, system: OurCron, used_before_s: dict[str, float], idle_share: dict[str, float]
) -> None:
    """What one launch costs the daemons, above what they use without; the runs' own processes are not in it."""
    leader = system.cluster.wait_leader()
    used_s = {
        daemon_id: used - used_before_s[daemon_id] - idle_share[daemon_id] * size.seconds
        for daemon_id, used in system.processor_s().items()
    }
    workers = sum(used_s[worker_id] for worker_id in system.cluster.worker_ids)
    followers = sum(used_s[master_id] for master_id in system.cluster.master_ids if master_id != leader)
    for of, used in (("leader", used_s[leader]), ("two followers", followers), ("three workers", workers)):
        params: Params = {"jobs": size.jobs, "start": start, "of": of}
        emit(OURS, "processor_ms_per_launch", used * 1_000 / (size.jobs * size.seconds), "ms", params)


def _our_failovers(emit: Emit, size: Size, directory: Path) -> None:
    kills: list[tuple[int, int]] = []
    with OurCron(directory) as system:
        _begin(system, size, "spread")
        for _ in range(size.kills):
            victim, before_ns, dead_ns = system.kill_leader()
            kills.append((before_ns, dead_ns))
            time.sleep(DOWN_S)
            system.bring_back(victim)
            time.sleep(DOWN_S)
        runs = system.runs(size.jobs)
    firsts = [first_after_s(_until(runs, dead_ns + 30 * NS_PER_S), before_ns, dead_ns) for before_ns, dead_ns in kills]
    params: Params = {"jobs": size.jobs, "cause": "kill -9"}
    emit_quantiles(emit, OURS, "first_launch_after_failover_s", "s", params, firsts)


def _until(runs: list[Run], until_ns: int) -> list[Run]:
    return [run for run in runs if run.due_ns < until_ns]


def _our_rate(emit: Emit, size: Size, directory: Path) -> None:
    """Real workers; jobs are added until they do not keep up."""
    with OurCron(directory) as system:
        system.start()
        command, made = system.telling_command(), 0

        def rate_of(jobs: int) -> float:
            nonlocal made
            system.apply([spec(number, command, 1.0) for number in range(made, jobs)])
            made = jobs
            time.sleep(RATE_WARM_UP_S)
            from_ns = time.time_ns()
            time.sleep(size.rate_s)
            return per_s(system.runs(0), from_ns, time.time_ns())

        emit(OURS, "launches_per_s", most_per_s(size.rates, rate_of), "1/s", {"workers": "real"})


async def _played_rate(emit: Emit, size: Size, directory: Path) -> None:
    """Workers that are played; jobs are added until the leader does not keep up."""
    with OurCron(directory, change=small) as system:
        system.cluster.start(system.cluster.master_ids)
        await asyncio.to_thread(system.cluster.wait_leader)
        async with PlayedWorkers(system.cluster.config, system.cluster.certificates) as workers:
            made = 0

            def rate_of(jobs: int) -> float:
                nonlocal made
                system.apply([spec(number, ["/bin/true"], 1.0) for number in range(made, jobs)])
                made = jobs
                time.sleep(RATE_WARM_UP_S)
                from_ns = time.time_ns()
                time.sleep(size.rate_s)
                return workers.orders_per_s(from_ns, time.time_ns())

            rate = await asyncio.to_thread(most_per_s, size.rates, rate_of)
    emit(OURS, "launches_per_s", rate, "1/s", {"workers": "played"})


# The peers


def _apscheduler(emit: Emit, size: Size) -> None:
    jobs = [job_id(number) for number in range(size.jobs)]
    for trigger in ("interval", "cron"):
        system = f"apscheduler-{trigger}"
        for start in STARTS:
            runs = cron_apscheduler.measure(trigger, start, size.jobs, size.seconds)
            params: Params = {"jobs": size.jobs, "start": start, "leader": "steady"}
            _emit_account(emit, system, params, account(runs, jobs, *cron_apscheduler.window_of(runs, size.seconds)))
        measure = partial(cron_apscheduler.measure, trigger)
        rate = most_per_s(size.rates, lambda count, measure=measure: _rate_of(measure, count, size.rate_s))  # type: ignore[misc]
        emit(system, "launches_per_s", rate, "1/s", {"workers": "real"})


def _rate_of(measure: Callable[[str, int, float], list[Run]], jobs: int, seconds: float) -> float:
    """Starts per second of that many jobs that are due every second."""
    runs = measure("spread", jobs, seconds)
    first_s, last_s = cron_apscheduler.window_of(runs, round(seconds))
    return per_s(runs, first_s * NS_PER_S, last_s * NS_PER_S)


def _celery(emit: Emit, size: Size) -> None:
    jobs = [job_id(number) for number in range(size.jobs)]
    for start in STARTS:
        runs = _celery_runs(start, size.jobs, size.seconds)
        params: Params = {"jobs": size.jobs, "start": start, "leader": "steady"}
        _emit_account(emit, "celery", params, account(runs, jobs, *cron_apscheduler.window_of(runs, size.seconds)))
    rate = most_per_s(size.rates, lambda count: _rate_of(_celery_runs, count, size.rate_s))
    emit("celery", "launches_per_s", rate, "1/s", {"workers": "real"})


def _celery_runs(start: str, jobs: int, seconds: float) -> list[Run]:
    found: list[Run] = []

    def work(directory: Path) -> None:
        system = CelerySystem(directory / "celery", start, jobs)
        with system.running():
            time.sleep(seconds + 2 * ENDING_S)
            found.extend(system.runs())

    _in_directory(work)
    return found

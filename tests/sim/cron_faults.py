"""What goes wrong in the cron world, drawn from the seed: about once in an hour, and healed again."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.control.job_workers import serving_workers
from coordinator.machine.codec import job_spec_to_proto, settings_to_proto
from coordinator.model import CronJobSpec, NodeState
from tests.sim.cron_jobs import EDITS, SLICE_S, draw_policies
from tests.sim.cron_net import DOWN, UP
from tests.sim.cron_worker import Promises, Worker
from tests.sim.cron_world import LogFaults, World, failing_as_seed, without_looks_at_the_clock

LEADER_MOMENTS = (
    "proposed commit_launch",
    "applied commit_launch",
    "ordered",
    "started",
    "applied start_launch",
    "reported",
    "proposed finish_launch",
    "applied finish_launch",
    "receipt",
    "applied lose_launch",
    "applied decline_launch",
    "applied record_no_launch",
)
"""Before and after the commit of an intent, after dispatch, while it runs, after completion, before the receipt."""
WORKER_MOMENTS = ("order taken", "journaled", "started", "ended", "finished", "reported")
"""Before the start, between journal and start, during the run, after it, before and after the report."""
STEPS_UNTIL_S = 4 * 3_600.0
"""Clocks are left alone for so long before the end, so that no watermark is ahead of the quiet time."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of the slice is played, and what goes wrong in it. No kinds: everything."""

    seconds: float = SLICE_S
    fault_every_s: float = 3_600.0
    quiet_s: float = 5_400.0
    """At the end, without faults."""
    kinds: tuple[str, ...] = ()
    jobs: Callable[[CronJobSpec], CronJobSpec | None] | None = None
    """What is made of each job, beside the seed's choice; None leaves it out."""


class Faults:
    """The faults of one seed."""

    def __init__(self, world: World, plan: Plan) -> None:
        self.world = world
        self.rng = random.Random(f"{world.seed} faults")
        self._plan = plan
        self._is_calm = False
        self._steps_until = world.time.now + plan.seconds - STEPS_UNTIL_S
        self._kinds: dict[str, tuple[int, Callable[[], None]]] = {
            "leader": (2, self._kill_leader),
            "leader_moment": (7, self._kill_leader_at),
            "worker": (3, self._kill_worker),
            "worker_moment": (7, self._kill_worker_at),
            "partition": (4, self._cut_worker),
            "leader_alone": (3, self._cut_leader),
            "broken_stream": (2, self._break_streams),
            "paused_worker": (4, self._pause_worker),
            "clock": (4, self._step_clock),
            "masters_gone": (2, self._lose_masters),
            "workers_gone": (1, self._lose_workers),
            "lossy_log": (3, self._lose_proposals),
            "operator": (8, self._operate),
        }

    def schedule(self) -> None:
        """Draws when faults come."""
        at, end = self.world.time.now + 60.0, self.world.time.now + self._plan.seconds - self._plan.quiet_s
        while (at := at + self.rng.expovariate(1 / self._plan.fault_every_s)) < end:
            self.world.time.at(at, self._strike)

    def _strike(self) -> None:
        kinds = self._plan.kinds or tuple(self._kinds)
        kind = self.rng.choices(kinds, [self._kinds[kind][0] for kind in kinds])[0]
        self.world.counts[f"fault {kind}"] += 1
        self.world.note(f"fault: {kind}")
        self.world.thaw()
        self._kinds[kind][1]()

    def _later(self, delay_s: float, what: Callable[[], object]) -> None:
        """The end of a fault; everything ends when the seed calms down."""

        def act() -> None:
            if not self._is_calm:
                self.world.thaw()
                what()

        self.world.time.after(delay_s, act)

    def _span_s(self, short_s: float, long_s: float) -> float:
        """Mostly short, now and then long."""
        return self.rng.uniform(0.2, short_s) if self.rng.random() < 0.75 else self.rng.uniform(short_s, long_s)

    def _running(self) -> list[Worker]:
        return [worker for _, worker in sorted(self.world.workers.items()) if worker.process is not None]

    # Masters

    def _kill_leader(self) -> None:
        self.world.lose_leader(is_killed=self.rng.random() < 0.7)

    def _kill_leader_at(self) -> None:
        moment = self.rng.choice(LEADER_MOMENTS)
        delay_s = self.rng.choice((0.0, 0.0, self.rng.uniform(0.0, 0.01)))

        def strike(worker: Worker | None) -> None:
            self.world.note(f"fault: the leader is killed at: {moment}")
            self.world.counts[f"leader killed at {moment}"] += 1
            self.world.thaw()
            if delay_s:
                self.world.time.after(delay_s, partial(self.world.lose_leader, is_killed=True))
            else:
                self.world.lose_leader(is_killed=True)

        self._trap(moment, strike)

    def _trap(self, moment: str, strike: Callable[[Worker | None], None]) -> None:
        self.world.traps[moment] = strike
        self._later(3_000.0, lambda: self.world.traps.pop(moment, None))

    def _cut_leader(self) -> None:
        """Nobody hears the leader, it does not know; then another one is elected."""
        leader = self.world.leader
        if leader is None:
            return
        leader.is_cut = True

        def end() -> None:
            if self.world.leader is leader:
                self.world.lose_leader(is_killed=False)

        self.world.time.after(self.rng.uniform(0.1, 1.5), end)

    def _lose_masters(self) -> None:
        self.world.masters_gone = True
        self.world.lose_leader(is_killed=True, is_elected=False)
        self._later(self._span_s(300.0, 3 * 3_600.0), self._masters_return)

    def _masters_return(self) -> None:
        self.world.masters_gone = False
        if self.world.leader is None:
            self.world.time.after(self.rng.uniform(0.3, 2.0), self.world.elect)

    def _step_clock(self) -> None:
        """One master's clock steps, or all of them do; put right later."""
        if self.world.time.now > self._steps_until:
            return
        size_ms = round(self.rng.choice((3e3, 6e4, 3.6e6)) * self.rng.uniform(0.1, 1.0)) * self.rng.choice((-1, 1))
        masters = list(self.world.masters.values())
        stepped = masters if self.rng.random() < 0.4 else [self.rng.choice(masters)]
        if self.world.leader is not None and self.rng.random() < 0.6 and len(stepped) == 1:
            stepped = [self.world.leader.master]
        for master in stepped:
            self._step(master.id, size_ms)

            def put_right(master_id: str = master.id) -> None:
                self._step(master_id, self.rng.randint(-400, 400) - self.world.masters[master_id].offset_ms)

            self._later(self._span_s(600.0, 7_200.0), put_right)

    def _step(self, master_id: str, size_ms: int) -> None:
        world, master = self.world, self.world.masters[master_id]
        master.offset_ms += size_ms
        world.note(f"the clock of {master_id} steps by {size_ms} ms to {master.offset_ms:+} ms")
        leader = world.leader
        if leader is not None and leader.master is master:
            world.time.after(self.rng.uniform(0.0, 1.0), leader.look_at_clock)

    def _lose_proposals(self) -> None:
        share = self.rng.uniform(0.05, 0.5)
        self.world.log_faults = LogFaults(lost=share / 2, unknown=share / 2)
        self._later(self.rng.uniform(10.0, 120.0), partial(setattr, self.world, "log_faults", LogFaults()))

    # Workers

    def _kill_worker(self) -> None:
        running = self._running()
        if running:
            self._kill(self.rng.choice(running))

    def _kill(self, worker: Worker) -> None:
        self.world.thaw()
        is_machine = self.rng.random() < 0.3
        self.world.note(f"{worker.id} is killed" + (", with its machine" if is_machine else ""))
        worker.kill(is_machine=is_machine)
        self._later(self._span_s(20.0, 3_600.0), partial(self._start, worker))

    def _start(self, worker: Worker) -> None:
        if worker.process is None:
            self.world.note(f"{worker.id} starts again")
            worker.start()

    def _kill_worker_at(self) -> None:
        moment = self.rng.choice(WORKER_MOMENTS)

        def strike(worker: Worker | None) -> None:
            if worker is not None and worker.process is not None:
                self.world.note(f"fault: {worker.id} is killed at: {moment}")
                self.world.counts[f"worker killed at {moment}"] += 1
                self._kill(worker)

        self._trap(moment, strike)

    def _lose_workers(self) -> None:
        for worker in self._running():
            self._kill(worker)

    def _cut_worker(self) -> None:
        running = self._running()
        for worker in self.rng.sample(running, min(len(running), self.rng.choice((1, 1, 1, 2, 9)))):
            ways = self.rng.choice(((UP, DOWN), (UP, DOWN), (UP,), (DOWN,)))
            self.world.note(f"{worker.id} is cut off: {ways}")
            self.world.net.cut[worker.id] = frozenset(ways)
            self._later(self._span_s(30.0, 1_800.0), partial(self.world.net.heal, worker.id))

    def _break_streams(self) -> None:
        for stream in list(self.world.net.streams.values()):
            if self.rng.random() < 0.5 and not stream.has_worker_left:
                self.world.net.break_stream(stream)

    def _pause_worker(self) -> None:
        running = self._running()
        if not running:
            return
        worker = self.rng.choice(running)
        process = worker.process
        assert process is not None
        self.world.note(f"the agent of {worker.id} is paused")
        process.pause()
        self._later(self._span_s(30.0, 1_800.0), process.resume)

    # Operators

    def _operate(self) -> None:
        what = self.rng.choice(
            (
                *(self._pause_job, self._pause_all, self._edit, self._trigger, self._trigger, self._cancel),
                *(self._cancel, self._drain, self._join, self._stop_worker, self._delete_job),
            )
        )
        self.world.note(f"operator: {what.__name__}")
        what()

    def _job_id(self) -> str:
        return self.rng.choice(sorted(self.world.state.jobs))

    def _pause_job(self) -> None:
        job_id = self._job_id()
        self._set_paused(job_id, True)
        self._later(self._span_s(900.0, 10_800.0), partial(self._set_paused, job_id, False))

    def _set_paused(self, job_id: str, paused: bool) -> None:
        self.world.operator(set_job_paused=command_pb2.SetJobPaused(job_id=job_id, paused=paused))

    def _pause_all(self) -> None:
        self._set_all_paused(True)
        self._later(self._span_s(900.0, 7_200.0), partial(self._set_all_paused, False))

    def _set_all_paused(self, paused: bool) -> None:
        settings = settings_to_proto(replace(self.world.state.settings, cron_paused=paused))
        self.world.operator(change_settings=command_pb2.ChangeSettings(settings=settings))

    def _edit(self) -> None:
        job = self.world.state.jobs[self._job_id()]
        spec = draw_policies(job.spec, self.rng)
        spec = replace(spec, retry=job.spec.retry)  # NEVER shall mean never, whatever else is edited.
        if self.rng.random() < 0.6:
            spec = replace(spec, schedule=self.rng.choice(EDITS))
        self.world.operator(apply_job=command_pb2.ApplyJob(spec=job_spec_to_proto(spec), source="api"))

    def _delete_job(self) -> None:
        """Deletes a job, and makes it anew later."""
        job = self.world.state.jobs[self._job_id()]
        if len(self.world.state.jobs) > 10:
            self.world.operator(delete_job=command_pb2.DeleteJob(job_id=job.id))
            anew = command_pb2.ApplyJob(spec=job_spec_to_proto(job.spec), source="api")
            self._later(self._span_s(600.0, 3_600.0), partial(self.world.operator, apply_job=anew))

    def _trigger(self) -> None:
        job = self.world.state.jobs[self._job_id()]
        workers = serving_workers(self.world.state, job)
        if workers:
            manual = types_pb2.LAUNCH_TRIGGER_MANUAL
            self.world.operator(
                commit_launch=command_pb2.CommitLaunch(job_id=job.id, worker=workers[0], trigger=manual)
            )

    def _cancel(self) -> None:
        """What runs now, or what runs next."""

        def cancel() -> None:
            running = sorted(key for key, launch in self.world.state.launches.items() if not launch.state.has_ended)
            if running:
                job_id, scheduled_at_ms = self.rng.choice(running)
                self.world.operator(
                    cancel_launch=command_pb2.CancelLaunch(
                        job_id=job_id, scheduled_at_unix_ms=scheduled_at_ms, reason="an operator cancelled it"
                    )
                )

        moment = self.rng.choice(("started", "order taken", "applied commit_launch"))
        self._trap(moment, lambda worker: self.world.time.after(self.rng.uniform(0.0, 0.5), cancel))

    def _drain(self) -> None:
        node_id = self.rng.choice(sorted(self.world.workers))
        if node_id in self.world.state.nodes:
            self.world.operator(drain_node=command_pb2.DrainNode(node_id=node_id))
            undrain = command_pb2.UndrainNode(node_id=node_id)
            self._later(self._span_s(600.0, 7_200.0), partial(self.world.operator, undrain_node=undrain))

    def _join(self) -> None:
        if len(self.world.workers) < 7:
            self.world.add_worker(f"w{len(self.world.workers) + 1}").start()

    def _stop_worker(self) -> None:
        running = self._running()
        if running:
            worker = self.rng.choice(running)
            process = worker.process
            assert process is not None
            process.stop()
            self._later(self.rng.uniform(20.0, 600.0), partial(self._start, worker))

    # The end

    def calm(self) -> None:
        """Every fault ends."""
        world, self._is_calm = self.world, True
        world.thaw()
        world.note("calm")
        world.traps.clear()
        world.log_faults = LogFaults()
        for master in world.masters.values():
            master.is_up = True
            self._step(master.id, self.rng.randint(-400, 400) - master.offset_ms)
        self._masters_return()
        for worker in world.workers.values():
            world.net.heal(worker.id)
            if worker.process is not None and worker.process.is_paused:
                worker.process.resume()
            self._start(worker)
        world.time.after(10.0, self._calm_operators)

    def _calm_operators(self) -> None:
        world = self.world
        self._set_all_paused(False)
        for job_id in sorted(world.state.jobs):
            self._set_paused(job_id, False)
        for node in sorted(world.state.nodes.values(), key=lambda node: node.id):
            if node.state is not NodeState.LEFT:
                world.operator(undrain_node=command_pb2.UndrainNode(node_id=node.id))
        for worker in world.workers.values():
            if worker.process is None:
                self._start(worker)


def run_seed(seed: int, plan: Plan | None = None, promises: Promises | None = None) -> World:
    """Plays a seed to its end. Raises SeedFailed."""
    plan = plan or Plan()
    world = World(seed, promises)
    with failing_as_seed(world), without_looks_at_the_clock():
        world.found(plan.jobs)
        end = world.time.now + plan.seconds
        faults = Faults(world, plan)
        faults.schedule()
        world.time.run_until(end - plan.quiet_s)
        faults.calm()
        world.time.run_until(world.time.now + 20.0)
        world.oracle.calm()
        world.time.run_until(end)
        world.check_all()
    return world

"""A move of a shard's primary from A to B, interrupted once at every message and every commit that it consists of.

interrupted_move.py has the world, with real masters and real replicas, and says what a step is. The cases are
generated: one for each step of an undisturbed move, in order, and for each of A, B and the leader. Which kinds of steps
there are is written down below, and held to be complete. After each case the move has ended, or was rolled back, the
cluster is whole again, replicas and masters are equal, and what was acknowledged is there, once and in order.

Every pair of crashes at every step: `tools/test -m campaign tests/sim/test_interrupted_moves.py`.
"""

from __future__ import annotations

from functools import cache

import pytest

from coordinator.model import MovePhase
from tests.sim.interrupted_move import Cut, play

AWAY_S = (0.3, 3.0)
"""How long who crashes is away: shorter than it takes to be suspected, and longer than it takes to be given up."""
VICTIMS = ("A", "B", "leader")
PAIRS = (("A", "B"), ("A", "leader"), ("B", "leader"))
CUTOVER_S_MAX = 0.03
SEEDS_LOOKED_AT = 50

KINDS = {
    "commit copying",
    "leader to A: assignment",
    "leader to R: assignment",
    "leader to B: assignment",
    "A to leader: report ACCEPTED",
    "R to leader: report ACCEPTED",
    "B to leader: report ACCEPTED",
    "A to B: probe",
    "B to A: standing",
    "A to B: copy_chunk",
    "B to A: copy_acknowledge",
    "A to B: append",
    "B to A: acknowledge",
    "A to leader: report ACCEPTED with B",
    "commit ceding",
    "A to R: append",
    "R to A: acknowledge",
    "A to B: ceded",
    "B to A: ceded_acknowledge",
    "A to leader: report CEDED",
    "commit removing",
    "B to A: probe",
    "A to B: standing",
    "B to R: probe",
    "R to B: standing",
    "B to A: append",
    "A to B: acknowledge",
    "B to R: append",
    "R to B: acknowledge",
    "commit done",
}


@cache
def table_seed() -> int:
    """The seed of the table: the first whose move has every kind of step; some come only with what others do."""
    return next(seed for seed in range(1, SEEDS_LOOKED_AT) if set(play(seed).steps) == KINDS)


@cache
def undisturbed() -> tuple[str, ...]:
    """The steps of a move that nothing happens to."""
    return tuple(play(table_seed()).steps)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case for each step."""
    if "number" in metafunc.fixturenames:
        ids = [f"{number:02}, {name}" for number, name in enumerate(undisturbed())]
        metafunc.parametrize("number", range(len(ids)), ids=ids)


def test_the_table_has_every_step() -> None:
    """What a move consists of is what the table says, each message and commit, and the same seed plays it again."""
    assert set(undisturbed()) == KINDS
    world = play(table_seed())
    assert tuple(world.steps) == undisturbed()
    assert world.move is not None
    assert world.move.phase is MovePhase.DONE


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_step_is_cut(number: int, victim: str) -> None:
    """Whoever crashes when a step is cut: the move ends or is rolled back, all is whole again, and nothing is lost."""
    place = number + VICTIMS.index(victim)
    play(table_seed(), Cut(number, (victim,), AWAY_S[place % 2]))


def test_a_move_is_aborted_at_every_step(number: int) -> None:
    """Whenever an operator asks: before its cutover the move is rolled back, after that it goes on to the end."""
    world = play(table_seed(), Cut(number, (), 0.0))
    assert world.move is not None
    has_cut_over = "commit removing" in undisturbed()[: number + 1]
    assert world.move.phase is MovePhase.DONE if has_cut_over else "the operator wants it" in world.move.outcome


@pytest.mark.campaign
@pytest.mark.parametrize("away_s", AWAY_S)
@pytest.mark.parametrize("victims", PAIRS, ids=" and ".join)
def test_two_crash_when_a_step_is_cut(number: int, victims: tuple[str, ...], away_s: float) -> None:
    """Any two of them at once lose nothing either."""
    play(table_seed(), Cut(number, victims, away_s))


@pytest.mark.parametrize("seed", range(1, 9))
def test_a_cutover_takes_no_longer_than_its_messages(seed: int) -> None:
    """From the moment when A stops to the moment when B serves pass some messages and syncs, not a timer."""
    assert 0.0 < play(seed).paused_s < CUTOVER_S_MAX

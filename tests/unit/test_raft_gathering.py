"""When a leader appends: a lone caller's command at once, those of many callers together, and none ever late."""

from __future__ import annotations

from coordinator.raft.gathering import CROWDED_S_MAX, GATHER_S_MAX, LINGER_S, QUIET_S, Gathering

NOW_S = 100.0
INSTANT_S = 1e-6


def gathering_with(queued: int) -> Gathering:
    gathering = Gathering()
    gathering.queued = queued
    return gathering


def after_a_crowd(callers: int) -> Gathering:
    """So many were seen at once, in two batches; the second, of entries up to 10, is committed and nobody is back."""
    gathering = gathering_with(1)
    gathering.appended(1, NOW_S - 0.002)
    gathering.queued = callers - 1
    gathering.holds(1, NOW_S - 0.001)
    gathering.queued = callers
    gathering.appended(10, NOW_S - 0.001)
    gathering.holds(10, NOW_S)
    return gathering


def test_the_first_command_is_appended_at_once() -> None:
    """Nothing is on its way, so there is nothing to wait for."""
    assert not gathering_with(1).holds(0, NOW_S)


def test_a_lone_caller_never_waits() -> None:
    """Its next command comes when the one before is committed, and finds nothing to wait for."""
    gathering = Gathering()
    for index in range(1, 6):
        gathering.queued += 1
        assert not gathering.holds(index - 1, NOW_S + index)
        gathering.appended(index, NOW_S + index)
        # The step that commits it finds an empty queue.
        gathering.holds(index, NOW_S + index + 0.001)


def test_commands_gather_while_a_batch_is_on_its_way() -> None:
    """What is proposed before the commit is held, and not longer than GATHER_S_MAX where no commit comes."""
    gathering = gathering_with(1)
    gathering.appended(1, NOW_S)
    gathering.queued += 1
    assert gathering.holds(0, NOW_S + INSTANT_S)
    assert not gathering.holds(0, NOW_S + GATHER_S_MAX)


def test_the_next_batch_waits_for_as_many_as_were_seen_at_once() -> None:
    """Two got their answer and three wait already: five may be expected."""
    gathering = gathering_with(2)
    gathering.appended(2, NOW_S)
    gathering.queued = 3
    assert gathering.holds(2, NOW_S + 0.001)
    gathering.queued += 1
    assert gathering.holds(2, NOW_S + 0.001)
    gathering.queued += 1
    assert not gathering.holds(2, NOW_S + 0.001)


def test_callers_that_do_not_come_back_are_not_waited_for() -> None:
    """The wait ends LINGER_S after the commit, and the batch after it expects only who was there."""
    gathering = gathering_with(8)
    gathering.appended(8, NOW_S)
    gathering.queued = 1
    committed_s = NOW_S + 0.001
    assert gathering.holds(8, committed_s)
    assert gathering.holds(8, committed_s + LINGER_S - INSTANT_S)
    assert not gathering.holds(8, committed_s + LINGER_S)
    gathering.appended(9, committed_s + LINGER_S)
    assert gathering.queued == 0
    gathering.queued = 1
    assert gathering.holds(9, NOW_S + 1.0)
    gathering.queued = 2
    assert not gathering.holds(9, NOW_S + 1.0)


def test_callers_who_are_answered_all_at_once_are_expected_again() -> None:
    """Nothing is queued when their batch is committed, as all of them were in it; the first to be back is not alone."""
    gathering = after_a_crowd(5)
    gathering.queued = 1
    assert gathering.holds(10, NOW_S)
    gathering.queued = 5
    assert not gathering.holds(10, NOW_S)


def test_a_caller_who_is_left_alone_waits_once() -> None:
    """After a batch that its company did not come for it is taken for a lone one."""
    gathering = after_a_crowd(5)
    gathering.queued = 1
    assert gathering.holds(10, NOW_S + LINGER_S - INSTANT_S)
    late_s = NOW_S + LINGER_S
    assert not gathering.holds(10, late_s)
    gathering.appended(11, late_s)
    gathering.holds(11, late_s + 0.001)
    gathering.queued = 1
    assert not gathering.holds(11, late_s + 0.001)


def test_calls_that_come_close_together_are_waited_for() -> None:
    """Both waits go on while each call follows the one before within QUIET_S, to CROWDED_S_MAX."""
    gathering = gathering_with(50)
    gathering.appended(50, NOW_S)
    gathering.queued = 1
    committed_s = now_s = NOW_S + 0.001
    while now_s < committed_s + CROWDED_S_MAX - QUIET_S:
        assert gathering.holds(50, now_s)
        now_s += QUIET_S / 2
        gathering.proposed(now_s)
    assert not gathering.holds(50, committed_s + CROWDED_S_MAX)


def test_an_urgent_command_waits_for_nobody() -> None:
    """Neither for a batch on its way nor for company; what is queued goes with it, and the next one waits again."""
    gathering = gathering_with(4)
    gathering.appended(4, NOW_S)
    gathering.queued = 1
    assert gathering.holds(0, NOW_S + INSTANT_S)
    gathering.queued = 2
    gathering.is_urgent = True
    assert not gathering.holds(0, NOW_S + INSTANT_S)
    gathering.closed_until_s = NOW_S + 1.0
    assert gathering.holds(0, NOW_S + INSTANT_S), "another master is to take over with the whole log"
    gathering.closed_until_s = 0.0
    gathering.appended(6, NOW_S + INSTANT_S)
    gathering.queued = 1
    assert gathering.holds(4, NOW_S + 2 * INSTANT_S)


def test_a_lone_caller_does_not_wait_for_what_was_urgent() -> None:
    """The leader's own command is no caller who comes back: whoever came behind it goes as soon as it is committed."""
    gathering = gathering_with(1)
    gathering.is_urgent = True
    gathering.appended(1, NOW_S)
    gathering.queued = 1
    assert gathering.holds(0, NOW_S + INSTANT_S), "its batch is on its way"
    assert not gathering.holds(1, NOW_S + 0.001)


def test_a_new_term_owes_nothing_to_the_one_before() -> None:
    """A leader that was deposed with a batch on its way, and leads again, appends its first command without a wait."""
    gathering = gathering_with(4)
    gathering.appended(50, NOW_S)
    gathering.queued = 1
    # A shorter log took the place of its own: the batch's index is never reached.
    assert not gathering.holds(40, NOW_S + 2.0)

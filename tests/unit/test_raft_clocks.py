"""What masters know of each other's wall clocks, what they hold of their own, and what follows, in virtual time."""

from __future__ import annotations

from pathlib import Path

import pytest
from pysyncobj import FAIL_REASON

from coordinator.api.v1 import peer_pb2
from coordinator.config import RaftSettings
from coordinator.model import ManualClock
from coordinator.raft.clock_duty import REFUSALS
from coordinator.raft.clocks import EXACT, KNOWN_S, Clocks, Interval, Verdict, judge
from coordinator.raft.frames import pack, parse, to_frame, to_message
from tests.raft_machine import applied, times
from tests.raft_network import STEP_S, Network, network

SETTINGS = RaftSettings()


class Side:
    """One master's clocks, with times of its own."""

    def __init__(self, wall_offset_s: float = 0.0, *peers: str) -> None:
        self.clock = ManualClock()
        self.clock.step_wall(wall_offset_s)
        self.clocks = Clocks(peers or ("m1", "m2", "m3"), SETTINGS, self.clock.wall_ms)

    @property
    def now_s(self) -> float:
        return self.clock.monotonic()

    def stamp(self, to_id: str, *, tells_all: bool = False) -> peer_pb2.ClockReading:
        return self.clocks.stamp(to_id, self.now_s, tells_all=tells_all)

    def take(self, from_id: str, reading: peer_pb2.ClockReading) -> None:
        self.clocks.take(from_id, reading, self.now_s)

    def offset(self, id: str) -> Interval:
        return self.clocks.offsets(self.now_s)[id]


def advance(seconds: float, *sides: Side) -> None:
    for side in sides:
        side.clock.advance(seconds)


def exchange(one: Side, one_id: str, other: Side, other_id: str, delay_s: float = 0.01) -> None:
    """There, back and there again, so that both know each other's clock."""
    for sender, sender_id, receiver, receiver_id in (
        (one, one_id, other, other_id),
        (other, other_id, one, one_id),
        (one, one_id, other, other_id),
    ):
        reading = sender.stamp(receiver_id, tells_all=True)
        advance(delay_s, one, other)
        receiver.take(sender_id, reading)


def exact(seconds: float) -> Interval:
    return Interval(seconds, seconds)


def test_an_answer_tells_the_offset_within_the_round_trip() -> None:
    """Shows that the offset is known within half of what the answer took, however long it was held at the peer."""
    one, other = Side(), Side(3.0)
    reading = one.stamp("m2")
    advance(0.02, one, other)
    other.take("m1", reading)
    advance(1.5, one, other)
    answer = other.stamp("m1")
    advance(0.04, one, other)
    one.take("m2", answer)
    found = one.offset("m2")
    assert found.low_s <= 3.0 <= found.high_s
    assert 0.03 <= found.uncertainty_s < 0.033
    assert "m1" not in other.clocks.offsets(other.now_s), "a first message alone bounds nothing"


def test_a_step_of_the_own_clock_shows_at_once() -> None:
    """Shows that what was heard before a step is right after it: peers are measured by the monotonic clock."""
    one, other = Side(), Side()
    exchange(one, "m1", other, "m2")
    one.clock.step_wall(-10.0)
    found = one.offset("m2")
    assert found.low_s <= 10.0 <= found.high_s
    assert found.uncertainty_s < 0.1


def test_what_is_old_does_not_count() -> None:
    """Shows that a clock that was not heard for KNOWN_S is not known any more, and less certain before."""
    one, other = Side(), Side()
    exchange(one, "m1", other, "m2")
    before = one.offset("m2").uncertainty_s
    advance(KNOWN_S - 0.1, one, other)
    assert one.offset("m2").uncertainty_s > before + 0.009
    assert one.clocks.knows("m2", one.now_s)
    advance(0.2, one, other)
    assert one.clocks.offsets(one.now_s) == {}
    assert not one.clocks.knows("m2", one.now_s)
    assert one.clocks.verdict(one.now_s) == Verdict()


def test_others_are_known_through_a_third() -> None:
    """Shows that a follower learns of another follower's clock from the leader, and that its own word comes first."""
    leader, two, three = Side(), Side(1.0), Side(-4.0)
    exchange(leader, "m1", three, "m3")
    advance(0.02, two)
    exchange(leader, "m1", two, "m2")
    found = two.offset("m3")
    assert found.low_s <= -5.0 <= found.high_s
    assert found.uncertainty_s < 0.1
    advance(0.04, three)
    exchange(two, "m2", three, "m3")
    own_word = two.offset("m3")
    assert own_word.uncertainty_s < found.uncertainty_s
    leader.clocks.observe("m3", Interval(0.0, 1e9), leader.now_s)
    two.take("m1", leader.stamp("m2", tells_all=True))
    assert two.offset("m3") == own_word


def test_a_new_connection_echoes_nothing_old() -> None:
    """Shows that a stamp from before a restart, of another monotonic clock, is not echoed."""
    one, other = Side(), Side()
    other.take("m1", one.stamp("m2"))
    assert other.stamp("m1").echo_us
    other.clocks.connected("m1")
    assert not other.stamp("m1").echo_us


@pytest.mark.parametrize("echo_us", [2**64 - 1, 1, 2_000_000_000])
def test_what_cannot_be_true_is_not_taken(echo_us: int) -> None:
    """Shows that an echo of what was never sent, or of what is long over, tells nothing."""
    side = Side()
    reading = peer_pb2.ClockReading(wall_unix_ms=2**63 - 1, sent_at_us=2**64 - 1, echo_us=echo_us, held_us=0)
    reading.others.add(id="m3", offset_us=2**63 - 1, uncertainty_us=2**64 - 1, age_us=2**64 - 1)
    reading.others.add(id="nobody")
    side.take("m2", reading)
    assert side.clocks.offsets(side.now_s) == {}
    assert side.stamp("m2").held_us == 0


def test_readings_of_any_size_can_be_passed_on() -> None:
    """Shows that an absurd clock and absurd words about others are stamped, sent and judged without harm."""
    side = Side()
    for _ in range(3):
        echo = side.stamp("m2").sent_at_us
        reading = peer_pb2.ClockReading(wall_unix_ms=-(2**63), sent_at_us=2**64 - 1, echo_us=echo)
        reading.others.add(id="m3", offset_us=2**63 - 1, uncertainty_us=2**64 - 1)
        side.take("m2", reading)
        message = {"type": "pre_vote", "term": 1, "last_log_index": 1, "last_log_term": 0}
        stamped = message | {"clock": side.stamp("m1", tells_all=True)}
        assert to_message(parse(pack(to_frame(stamped))[4:])) == stamped
    assert side.clocks.verdict(side.now_s).known == 3


# The verdict


@pytest.mark.parametrize(
    ("own_s", "others_s", "offset_s", "is_off", "refuses"),
    [
        (0.0, [], 0.0, False, False),
        (0.0, [10.0], -10.0, True, False),  # Of two nobody can tell which is wrong.
        (0.0, [0.1, -0.1], 0.0, False, False),
        (0.0, [0.4, 0.4], -0.4, False, False),
        (0.0, [0.6, 0.6], -0.6, True, False),
        (0.0, [-6.0, -6.0], 6.0, True, True),
        (0.0, [0.0, 100.0], 0.0, False, False),
        (0.0, [10.0, 20.0], -10.0, True, True),
        (0.0, [0.0, 10.0, 10.0], -10.0, True, False),
        (0.0, [10.0, 10.0, 10.0], -10.0, True, True),
        (0.0, [4.9, 9.0, 12.0, -3.0], -4.9, True, False),
    ],
)
def test_the_measure_is_the_median(
    own_s: float, others_s: list[float], offset_s: float, is_off: bool, refuses: bool
) -> None:
    """Shows the verdict on one clock among exactly known ones."""
    found = judge(exact(own_s), [exact(one) for one in (own_s, *others_s)], SETTINGS)
    assert found.offset_s == pytest.approx(offset_s)
    assert (found.known, found.is_off, found.refuses) == (1 + len(others_s), is_off, refuses)


def test_an_offset_counts_only_beyond_its_uncertainty() -> None:
    """Shows that clocks that may be the same are not called different, and that certain ones are."""
    unsure, sure = Interval(-1.0, 19.0), Interval(5.1, 12.9)
    assert not judge(EXACT, (EXACT, unsure, unsure), SETTINGS).is_off
    assert judge(EXACT, (EXACT, sure, unsure), SETTINGS) == Verdict(-9.0, 3)
    assert judge(EXACT, (EXACT, sure, sure), SETTINGS).refuses


def test_news_come_once_per_change() -> None:
    """Shows one line when a clock goes wrong, one when it is worse, one when it is right, and none for trembling."""
    side = Side()

    def news(offset_s: float) -> str | None:
        rest_s = side.clock.wall_ms() / 1_000 - side.now_s
        for id in ("m2", "m3"):
            side.clocks.observe(id, exact(rest_s + offset_s), side.now_s)
        return side.clocks.news(side.now_s)

    side = Side(0.0, "m2", "m3")
    assert news(0.2) is None
    warning = news(0.7)
    assert warning is not None
    assert "its wall clock is 0.7 s behind the other masters'" in warning
    assert "chronyc" in warning
    assert [news(0.8), news(0.49), news(0.51)] == [None, None, None]
    refusal = news(-7.0)
    assert refusal is not None
    assert "7 s ahead of" in refusal
    assert "it refuses to lead" in refusal
    assert news(-4.9) is None
    assert news(0.1) == "its wall clock agrees with the other masters' again"
    assert news(0.1) is None


# What follows, with real masters


def others(net: Network, id: str) -> list[str]:
    return [other for other in net.ids if other != id]


def turn_for(net: Network, seconds: float) -> None:
    end_s = net.now_s + seconds
    while net.now_s < end_s:
        net.turn()


def verdict(net: Network, id: str) -> Verdict:
    return net.masters[id].elections.duty.clocks.verdict(net.now_s)


@pytest.mark.parametrize("step_s", [10.0, -10.0])
def test_a_leader_whose_clock_steps_hands_over(tmp_path: Path, step_s: float) -> None:
    """Shows that a leader whose clock steps by 10 s is followed within 2 s by another one, and nothing is lost."""
    with network(tmp_path) as net:
        old = net.elect()
        net.commit(old, "before")
        net.clocks[old].step_wall(step_s)
        net.run(lambda: net.leader() not in (old, None), seconds=2.0)
        net.commit(net.elect(), "after")
        net.run(lambda: all(applied(master.state) == ["before", "after"] for master in net.masters.values()))
        turn_for(net, 1.0)
        assert net.leader() != old
        assert verdict(net, old).offset_s == pytest.approx(step_s, abs=0.1)
        assert verdict(net, old).refuses


@pytest.mark.parametrize("turns", range(3))
def test_no_entry_gets_the_time_of_a_clock_that_stepped(tmp_path: Path, turns: int) -> None:
    """Shows that commands that come at the step, at any place between two looks at the clock, wait for a better one."""
    with network(tmp_path) as net:
        old = net.elect()
        net.commit(old, "before")
        turn_for(net, 1.0 + turns * STEP_S)
        net.clocks[old].step_wall(3_600.0)
        outcomes = [net.propose(id, f"at the step {id}") for id in net.ids]
        net.run(lambda: net.leader() not in (old, None), seconds=2.0)
        new = net.elect()
        net.commit(new, "after")
        net.run(lambda: all(outcomes))
        assert max(times(net.masters[new].state)) <= net.clocks[new].wall_ms()


def test_all_masters_know_all_clocks(tmp_path: Path) -> None:
    """Shows that followers, which do not speak with each other, know each other's clocks, and the bad one its own."""
    with network(tmp_path) as net:
        bad = others(net, net.elect())[0]
        net.clocks[bad].step_wall(0.8)
        turn_for(net, 1.0)
        assert {id: verdict(net, id).known for id in net.ids} == dict.fromkeys(net.ids, 3)
        assert [id for id in net.ids if verdict(net, id).is_off] == [bad]
        assert not verdict(net, bad).refuses
        for id in others(net, bad):
            found = net.masters[id].elections.duty.clocks.offsets(net.now_s)[bad]
            assert found.low_s <= 0.8 <= found.high_s


def test_a_bad_clock_does_not_lead_from_the_start(tmp_path: Path) -> None:
    """Shows that of masters that all start, one whose clock is far off waits for all clocks and is not elected."""
    for seed in range(20):
        directory = tmp_path / str(seed)
        directory.mkdir()
        with network(directory, seed=seed) as net:
            net.clocks["m2"].step_wall(-10.0)
            for _ in range(150):
                net.turn()
                assert not net.masters["m2"].is_raft_leader
            assert net.elect() != "m2"


def test_a_candidate_waits_for_all_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that a majority is not enough while a connected master's clock is unknown: it may be the one that tells."""
    with network(tmp_path) as net:
        net.clocks["m2"].step_wall(-10.0)
        turn_for(net, 0.3)
        held: list[bytes] = []
        take = net.links["m2"].receive

        def take_without_m3(from_id: str, frame: bytes) -> None:
            if from_id == "m3":
                held.append(frame)
            else:
                take(from_id, frame)

        monkeypatch.setattr(net.links["m2"], "receive", take_without_m3)
        net.masters["m2"]._engine.stand_for_election()
        for _ in range(5):
            net.turn()
            assert net.masters["m2"].role == "follower"
        assert net.masters["m2"].elections.pre_votes == 1
        assert verdict(net, "m2").known == 2
        monkeypatch.undo()
        for frame in held:
            take("m3", frame)
        assert verdict(net, "m2").refuses
        assert net.elect() != "m2"


def test_when_the_leader_dies_the_good_clock_takes_over(tmp_path: Path) -> None:
    """Shows that of two followers the one with the bad clock does not stand, though it alone asks at first."""
    for seed in range(10):
        directory = tmp_path / str(seed)
        directory.mkdir()
        with network(directory, seed=seed) as net:
            old = net.elect()
            bad, good = others(net, old)
            net.clocks[bad].step_wall(10.0)
            turn_for(net, 1.0)
            net.stop(old)
            net.run(lambda: net.leader() is not None)
            assert net.leader() == good


def test_two_masters_with_two_times_still_have_a_leader(tmp_path: Path) -> None:
    """Shows that of two neither refuses, and that both say that they differ."""
    with network(tmp_path, ids=("m1", "m2")) as net:
        net.clocks["m2"].step_wall(3_600.0)
        net.commit(net.elect(), "on")
        turn_for(net, 1.0)
        assert {id: (verdict(net, id).is_off, verdict(net, id).refuses) for id in net.ids} == {
            "m1": (True, False),
            "m2": (True, False),
        }


def test_a_bad_clock_with_the_only_whole_log_leads_in_the_end(tmp_path: Path) -> None:
    """Shows that an entry is worth more than a clock: who alone has it leads after REFUSALS, and then hands over."""
    ids = ("m1", "m2", "m3", "m4", "m5")
    with network(tmp_path, ids=ids) as net:
        old = net.elect()
        second, bad, *behind = others(net, old)
        for id in behind:
            for holder in (old, second, bad):
                net.cut(holder, id)
        net.commit(old, "precious")
        for id in (old, second):
            net.stop(id)
        net.clocks[bad].step_wall(60.0)
        for id in behind:
            net.mend(bad, id)
        began_s = net.now_s
        net.run(lambda: net.leader() is not None, seconds=20.0)
        assert net.leader() == bad
        assert net.now_s - began_s > REFUSALS * SETTINGS.election_timeout_s_max
        net.run(lambda: net.leader() in behind, seconds=3.0)
        net.run(lambda: all(applied(net.masters[id].state) == ["precious"] for id in (bad, *behind)))


def test_without_a_good_follower_the_leader_goes_on(tmp_path: Path) -> None:
    """Shows that a leader that refuses and finds nobody to take over still commits, and hands over once it can."""
    with network(tmp_path) as net:
        old = net.elect()
        bad, good = others(net, old)
        net.clocks[bad].step_wall(-20.0)
        turn_for(net, 1.0)
        # Of three times the middle one is that of `good`, which cannot be reached.
        net.cut(old, good)
        net.clocks[old].step_wall(20.0)
        net.commit(old, "on")
        assert net.leader() == old
        net.mend(old, good)
        net.run(lambda: net.leader() not in (old, None), seconds=4.0)


def test_a_transfer_to_nobody_in_particular_avoids_bad_clocks(tmp_path: Path) -> None:
    """Shows that a leader that leaves prefers a follower with a good clock, and knows which one not to ask."""
    with network(tmp_path) as net:
        old = net.elect()
        bad = others(net, old)[1]  # The one that PySyncObj would choose.
        net.clocks[bad].step_wall(10.0)
        turn_for(net, 1.0)
        duty = net.masters[old].elections.duty
        assert duty.refusal_of(bad) is not None
        assert duty.refusal_of(others(net, old)[0]) is None
        net.run(lambda: net.masters[old].transfer(None) == FAIL_REASON.SUCCESS)
        net.run(lambda: net.leader() not in (old, None))
        assert net.leader() == others(net, old)[0]

"""A master's files, damaged at random while it was stopped: it refuses with a clear line, or it has lost nothing.

The directory is one that a real master made: several segments, a snapshot, terms and votes. "Lost nothing" means that
state, log, term and vote are what they were, or, where the cut is what a power cut can leave, that only entries are
missing that were never synced. Each damage has a seed, which is the name of its test.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.machine.state import State
from coordinator.model import WallMs
from coordinator.model.errors import Damaged
from coordinator.raft.entry import is_command, payload_of, stamp, time_of
from coordinator.raft.files import ADVICE, SNAPSHOT_NAME
from coordinator.raft.journal import Entry, Journal
from coordinator.raft.snapshot import Snapshot, SnapshotStore, encode_file
from tests.raft_machine import MACHINE, applied, command
from tests.raft_network import InlineExecutor

OWNER = "test/m1"
SEGMENT_BYTES = 2_000
ENTRIES = 200
COMPACTED = 60
"""Entries that the snapshot includes; the segments hold the later ones, and a few of these."""


@dataclass(frozen=True)
class Found:
    """What a start finds."""

    state: State
    last: Entry
    term: int
    voted_for: str | None

    @property
    def causes(self) -> list[str]:
        """The commands, in their order."""
        return applied(self.state)


def entry(index: int) -> Entry:
    """A command that can be told apart; some take several sectors."""
    cause = f"c{index}-" + "x" * (index * 37 % 900 if index % 5 == 0 else index % 60)
    return stamp(command(cause).SerializeToString(), WallMs(1_000 + index)), index, 1 + index // 50


def apply_all(state: State, entries: list[Entry]) -> State:
    """What a master does with them."""
    for content, index, _ in entries:
        assert is_command(content, 1 << 20)
        state = MACHINE.apply(state, payload_of(content), index, time_of(content)).state
    return state


def open_journal(directory: Path) -> Journal:
    """Small segments, so that there are several."""
    return Journal(directory, OWNER, SEGMENT_BYTES)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a master that was stopped cleanly."""
    return make_directory(tmp_path_factory.mktemp("stopped"), is_clean=True)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a master that was killed."""
    return make_directory(tmp_path_factory.mktemp("killed"), is_clean=False)


def make_directory(directory: Path, *, is_clean: bool) -> Path:
    """Entries 1 to ENTRIES in four terms, a snapshot up to COMPACTED, and the log cut up to there."""
    entries = [entry(index) for index in range(1, ENTRIES + 1)]
    with closing(open_journal(directory)) as journal:
        journal.setCurrentTerm(1, "m1")
        for content, index, term in entries:
            if term != journal.getCurrentTerm():
                journal.sync()
                journal.setCurrentTerm(term, f"m{1 + term % 3}")
            journal.add(content, index, term)
            if index == COMPACTED + 20:
                state = apply_all(State(), entries[:COMPACTED])
                before, last = entries[COMPACTED - 2 : COMPACTED]
                data = encode_file(Snapshot(before, last, state), MACHINE.encode)
                (directory / SNAPSHOT_NAME).write_bytes(data)
                journal.deleteEntriesTo(COMPACTED - 2)
        journal.sync()
        if is_clean:
            journal.mark()
    assert len(list(directory.glob("journal-*.log"))) > 5
    return directory


WHOLE = Found(
    apply_all(State(), [entry(index) for index in range(1, ENTRIES + 1)]), entry(ENTRIES), 5, "m3"
)
"""What an undamaged directory holds."""


def start(directory: Path) -> Found:
    """Loads a directory as Consensus does. Raises Damaged."""
    with closing(open_journal(directory)) as journal:
        with closing(SnapshotStore(directory, InlineExecutor(), MACHINE.encode, MACHINE.decode)) as store:
            snapshot = store.load()
        state, done = State(), 0
        if snapshot is not None:
            journal.align(snapshot.before, snapshot.last)
            state, done = snapshot.state, snapshot.index
        elif journal[0][1] != 1:
            raise Damaged(f"{journal.begin}: the log begins at entry {journal[0][1]}; {ADVICE}")
        state = apply_all(state, [one for one in journal[:] if one[1] > done])
        return Found(state, journal[-1], journal.getCurrentTerm(), journal.getVotedForNodeId())


def flip(path: Path, rng: random.Random) -> str:
    """Flips one to three bits of a file, which is not empty."""
    content = bytearray(path.read_bytes())
    places = [rng.randrange(len(content)) for _ in range(rng.randint(1, 3))]
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))
    return f"flipped bits of {path.name} at {places}"


def cut(path: Path, rng: random.Random) -> str:
    """Cuts a file."""
    content = path.read_bytes()
    size = rng.randrange(len(content))
    path.write_bytes(content[:size])
    return f"cut {path.name} from {len(content)} to {size}"


def blank(path: Path, rng: random.Random) -> str:
    """Makes one sector of a file zero."""
    content = bytearray(path.read_bytes())
    first = rng.randrange(len(content)) // 512 * 512
    content[first : first + 512] = bytes(len(content[first : first + 512]))
    path.write_bytes(bytes(content))
    return f"zeroed {path.name} at {first}"


def scramble(path: Path, rng: random.Random) -> str:
    """Writes random bytes over a part of a file."""
    content = bytearray(path.read_bytes())
    first = rng.randrange(len(content))
    size = min(rng.randint(1, 2_000), len(content) - first)
    content[first : first + size] = rng.randbytes(size)
    path.write_bytes(bytes(content))
    return f"scrambled {path.name} from {first} to {first + size}"


def remove(path: Path, rng: random.Random) -> str:
    """Removes a file."""
    path.unlink()
    return f"removed {path.name}"


def swap(path: Path, rng: random.Random) -> str:
    """Puts another file of the directory in the place of one."""
    other = rng.choice([found for found in sorted(path.parent.iterdir()) if found != path])
    path.write_bytes(other.read_bytes())
    return f"put {other.name} in the place of {path.name}"


DAMAGES: tuple[Callable[[Path, random.Random], str], ...] = (flip, flip, flip, cut, cut, blank, scramble, remove, swap)


def damage(directory: Path, rng: random.Random) -> str:
    """Damages one file; every second time the last segment, where a torn write may be."""
    paths = sorted(directory.iterdir())
    last = max(directory.glob("journal-*.log"))
    return rng.choice(DAMAGES)(last if rng.random() < 0.5 else rng.choice(paths), rng)


def check_message(error: Damaged, directory: Path) -> None:
    """One line with file, offset and what to do."""
    message = str(error)
    assert "\n" not in message
    assert str(directory) in message
    assert "offset " in message
    assert ADVICE in message


@pytest.mark.parametrize("seed", range(100))
def test_damage_after_a_clean_stop_refuses_or_loses_nothing(stopped: Path, tmp_path: Path, seed: int) -> None:
    """After a clean stop the whole log is marked as durable, so that no cut of it can pass for a torn write."""
    directory = tmp_path / "m1"
    shutil.copytree(stopped, directory)
    what = damage(directory, random.Random(seed))
    try:
        found = start(directory)
    except Damaged as error:
        check_message(error, directory)
    else:
        assert found == WHOLE, what


@pytest.mark.parametrize("seed", range(100))
def test_damage_after_a_kill_loses_the_unmarked_tail_at_most(killed: Path, tmp_path: Path, seed: int) -> None:
    """After a kill the end of the last segment may go as a torn write, but nothing before the latest mark, ever."""
    directory = tmp_path / "m1"
    shutil.copytree(killed, directory)
    with closing(open_journal(directory)) as journal:
        marked = journal.marked_index
    assert 150 <= marked < ENTRIES
    what = damage(directory, random.Random(seed))
    try:
        found = start(directory)
    except Damaged as error:
        check_message(error, directory)
        return
    assert (found.term, found.voted_for) == (WHOLE.term, WHOLE.voted_for), what
    assert found.causes == WHOLE.causes[: len(found.causes)], what
    assert found.last[1] >= marked, what
    if found != WHOLE:
        assert what.startswith(("cut journal", "zeroed journal", "scrambled journal")), what


def test_a_flipped_bit_of_the_log_is_found_wherever_it_is(killed: Path, tmp_path: Path) -> None:
    """Also in the last record, which looked like a torn write before; nothing but the exact log starts."""
    directory = shutil.copytree(killed, tmp_path / "m1")
    path = max(directory.glob("journal-*.log"))
    content = path.read_bytes()
    rng = random.Random(0)
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(damaged))
        with pytest.raises(Damaged) as caught:
            open_journal(directory)
        check_message(caught.value, directory)


def test_a_cut_of_a_log_that_was_stopped_cleanly_is_found(stopped: Path, tmp_path: Path) -> None:
    """Lost sectors at the end, wherever they begin: between two records too, and in the segment's header."""
    directory = shutil.copytree(stopped, tmp_path / "m1")
    path = max(directory.glob("journal-*.log"))
    content = path.read_bytes()
    for size in range(0, len(content), 5):
        path.write_bytes(content[:size])
        with pytest.raises(Damaged, match="it once held entry 200 safely"):
            open_journal(directory)
        assert path.read_bytes() == content[:size], "what is refused is left as it is"


def test_a_segment_that_is_missing_is_found(killed: Path, tmp_path: Path) -> None:
    """Whichever it is: the first (the snapshot does not reach it), one in the middle, or the last."""
    names = sorted(path.name for path in killed.glob("journal-*.log"))
    for name in names:
        directory = shutil.copytree(killed, tmp_path / name)
        (directory / name).unlink()
        with pytest.raises(Damaged) as caught:
            start(directory)
        check_message(caught.value, directory)


def test_a_torn_write_is_still_dropped(killed: Path, tmp_path: Path) -> None:
    """A power cut may leave a part of the last record, or its length without its sectors; the master starts."""
    directory = shutil.copytree(killed, tmp_path / "m1")
    path = max(directory.glob("journal-*.log"))
    content = path.read_bytes()
    with closing(open_journal(directory)) as journal:
        journal.add(stamp(command("y" * 1_500).SerializeToString(), WallMs(9_000)), ENTRIES + 1, 5)
    written = max(directory.glob("journal-*.log")).read_bytes()
    for size in range(len(content) + 1, len(written), 97):
        path.write_bytes(written[:size])
        assert start(directory) == WHOLE
    for first in range(-(-len(content) // 512) * 512, len(written), 512):
        torn = written[:first] + bytes(min(512, len(written) - first)) + written[first + 512 :]
        path.write_bytes(torn)
        assert start(directory) == WHOLE


def test_a_log_that_a_leader_cut_is_no_damage(tmp_path: Path) -> None:
    """A conflict shortens the log on purpose, below the mark: the mark is lowered first, at every step of a crash."""
    with closing(open_journal(tmp_path)) as journal:
        for index in range(1, 21):
            journal.add(*entry(index))
        journal.setCurrentTerm(7, None)
        journal.mark()
        assert journal.marked_index == 20
        journal.add(entry(9)[0], 9, 7)
        assert journal.marked_index == 8
    with closing(open_journal(tmp_path)) as journal:
        assert journal[-1] == (entry(9)[0], 9, 7)


def test_an_empty_segment_with_a_wrong_number_is_found(tmp_path: Path) -> None:
    """A header has no checksum, and one without records has nothing else to be compared with than its name."""
    with closing(open_journal(tmp_path)) as journal:
        journal.add(*entry(1))
    path = max(tmp_path.glob("journal-*.log"))
    header = bytearray(path.read_bytes()[:16])
    header[-1] ^= 4
    path.write_bytes(bytes(header))
    with pytest.raises(Damaged, match="it says that it begins at entry 5"):
        open_journal(tmp_path)

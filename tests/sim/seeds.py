"""The frame of the tests that play whole lives by seeds: which seeds there are, a campaign of many, one played twice.

Without variables the suite plays the seeds from 0 on. `SIM_SEED=4711` plays that one alone, `-k test_seed`. A campaign,
`-m campaign`, plays as many as SIM_SEEDS says, from SIM_FIRST on; by default they are those behind the suite's.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

SEEDS = 200
"""Of each kind, in the suite."""
PROGRESS_EVERY = 100
FAILURES_SHOWN = 20
PLAYED_S_MAX = 600
"""For a few seconds of work: tools/test plays seeds on what other tests leave of the processor."""
ROOT = Path(__file__).parents[2]


class SeedFailed(AssertionError):
    """A seed found something; its message is for whoever replays it."""


def replay(seed: int, path: str) -> str:
    """The line that says how a seed of the tests in this file is played again."""
    return f"replay: SIM_SEED={seed} tools/test {path} -k test_seed"


def of_the_suite(count: int = SEEDS) -> Sequence[int]:
    """The seeds to play: so many, or only the one that is asked for."""
    one = os.environ.get("SIM_SEED")
    return [int(one)] if one else range(count)


def play_campaign(play: Callable[[int], object], count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Plays `count` seeds, or as many as SIM_SEEDS says; says how far it is, and in the end which failed and how."""
    first, count = int(os.environ.get("SIM_FIRST", SEEDS)), int(os.environ.get("SIM_SEEDS", count))
    failures: list[str] = []
    for played, seed in enumerate(range(first, first + count), start=1):
        try:
            play(seed)
        except SeedFailed as failure:
            failures.append(str(failure))
        if played % PROGRESS_EVERY == 0:
            with capsys.disabled():
                sys.stdout.write(f"{played} of {count} seeds, {len(failures)} failed\n")
                sys.stdout.flush()
    assert not failures, f"{len(failures)} of {count} seeds failed:\n" + "\n\n".join(failures[:FAILURES_SHOWN])


def digest(story: Iterable[str]) -> str:
    """A story in one line: other for any other story."""
    return hashlib.sha256("\n".join(story).encode()).hexdigest()


def assert_decides_everything(seed: int, fingerprint: Callable[[int], str]) -> None:
    """Has two processes with other hash seeds, so with other orders of every set, play it: the same to the last event.

    `fingerprint` plays a seed and gives the digest of everything that happened; a function of a module.
    """
    module, name = fingerprint.__module__, fingerprint.__name__
    code = f"import sys; from {module} import {name}; sys.stdout.write({name}({seed}))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
            timeout=PLAYED_S_MAX,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(found) == 1

"""Progress of something long, on standard error: one line that is rewritten on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

import click

POLL_S = 0.25
PLAIN_LINE_EVERY_S = 2.0
"""In a log, at most one line in so many seconds, and none that says the same again."""


class Progress:
    """Says how far something is, as often as it changes. Use in `with`."""

    def __init__(self, stream: TextIO | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._now = now
        self._terminal = self._stream.isatty()
        self._last = ""
        self._last_s = float("-inf")
        self._begun_s = now()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal and self._last:
            click.echo("\r\x1b[K", file=self._stream, nl=False)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return self._now() - self._begun_s

    def update(self, line: str) -> None:
        """Shows the line, unless it says nothing new."""
        if line == self._last:
            return
        if self._terminal:
            click.echo(f"\r\x1b[K{line[:99]}", file=self._stream, nl=False)
        elif self._now() - self._last_s >= PLAIN_LINE_EVERY_S:
            click.echo(line, file=self._stream)
        else:
            return
        self._last, self._last_s = line, self._now()


def wait_until(
    ask: Callable[[], str | None],
    deadline_s: float,
    progress: Progress,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Asks until the answer is None (nothing is left), showing each answer; False when the time is up first."""
    while (left := ask()) is not None:
        progress.update(left)
        if progress.elapsed_s >= deadline_s:
            return False
        sleep(POLL_S)
    return True

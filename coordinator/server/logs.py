"""Logs of a daemon: one line per record to standard error, as text for people or as JSON for machines.

Times are UTC with milliseconds. A record carries the cause id of what it belongs to
(coordinator/README.md): given as `extra={"cause": ...}`, or set for everything inside a `with
cause("..."):` block, tasks started there included.

    2026-01-05T10:30:00.123Z INFO    w1 worker_agent.agent: launch loop_01 ended cause=cron/loop_01/4711
    {"time":"2026-01-05T10:30:00.123Z","level":"info","daemon":"w1","logger":"worker_agent.agent",
     "message":"...","cause":"..."}
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

from coordinator.config import LoggingSettings
from coordinator.model.errors import ConfigError

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
QUIET_LOGGERS = ("aiohttp.access", "asyncio", "grpc", "pysyncobj", "urllib3", "consul")
"""Libraries whose chatter below a warning tells an operator nothing."""

_cause: ContextVar[str] = ContextVar("cause", default="")


@contextlib.contextmanager
def cause(cause_id: str) -> Iterator[None]:
    """Everything logged inside the block carries `cause_id`, unless the record names its own."""
    token = _cause.set(cause_id)
    try:
        yield
    finally:
        _cause.reset(token)


def configure(settings: LoggingSettings, daemon_id: str, stream: TextIO | None = None) -> None:
    """Sets the process's logging up; called again it replaces what it set up before.

    `stream` defaults to standard error. Raises ConfigError for a level or a format that does not exist.
    """
    problems = []
    if settings.level not in LEVELS:
        problems.append(f"logging.level is {settings.level!r}; use one of {', '.join(LEVELS)}")
    if settings.format not in ("text", "json"):
        problems.append(f"logging.format is {settings.format!r}; use text or json")
    if problems:
        raise ConfigError(problems)
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter(daemon_id) if settings.format == "json" else TextFormatter(daemon_id))
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old.formatter, JsonFormatter | TextFormatter):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(LEVELS[settings.level])
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, LEVELS[settings.level]))
    logging.captureWarnings(True)


class TextFormatter(logging.Formatter):
    """One line for people; a traceback follows on lines of its own, indented."""

    def __init__(self, daemon_id: str) -> None:
        super().__init__()
        self._daemon_id = daemon_id

    def format(self, record: logging.LogRecord) -> str:
        parts = [_time(record), f"{record.levelname:<7}", self._daemon_id, f"{record.name}:", _message(record)]
        if cause_id := _cause_of(record):
            parts.append(f"cause={_one_line(cause_id)}")
        line = " ".join(parts)
        if trace := _trace(self, record):
            line += "\n" + "\n".join(f"    {part}" for part in trace.splitlines())
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object per line; `cause` and `exception` only where there is one."""

    def __init__(self, daemon_id: str) -> None:
        super().__init__()
        self._daemon_id = daemon_id

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "daemon": self._daemon_id,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if cause_id := _cause_of(record):
            fields["cause"] = cause_id
        if trace := _trace(self, record):
            fields["exception"] = trace
        return json.dumps(fields, separators=(",", ":"), ensure_ascii=False)


def _time(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, UTC)
    return at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1_000:03}Z"


def _cause_of(record: logging.LogRecord) -> str:
    return str(getattr(record, "cause", "") or _cause.get())


def _message(record: logging.LogRecord) -> str:
    return _one_line(record.getMessage())


def _one_line(text: str) -> str:
    """What people or programs sent must not be able to begin a line of its own in the log."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""

"""The example of worker_agent/README.md: a sink that checks tokens."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[2] / "worker_agent" / "README.md"


def test_the_sink_of_the_readme_takes_each_scheduled_time_once() -> None:
    """The same token twice, and a further attempt of a scheduled time that was taken, have no second effect."""
    example = re.search(r"```python\n(def record.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    names: dict[str, Any] = {}
    exec(example.group(1), names)
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE launches (job, scheduled_at, attempt, done, PRIMARY KEY (job, scheduled_at))")
    effects: list[str] = []
    for token in ("tick/1/1", "tick/1/1", "tick/1/2", "tick/2/2", "tick/2/1", "a/b/1/1"):
        names["record"](connection, token, lambda _, token=token: effects.append(token))
    assert effects == ["tick/1/1", "tick/2/2", "a/b/1/1"]
    connection.close()

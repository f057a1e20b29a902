"""What is wrong with a configuration, gathered so that a person sees all of it at once, each fault with its line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from coordinator.configuration.toml_lines import Path

SHOWN_CHARACTERS_MAX = 60
SECRETS: frozenset[Path] = frozenset({("discovery", "consul", "token")})
"""Values that never appear in a message."""


def dotted(path: Path) -> str:
    """A path as people write it: `cron.jobs[3].schedule`."""
    text = ""
    for name in path:
        if isinstance(name, int):
            text += f"[{name}]"
            continue
        is_bare = name != "" and all(character.isalnum() or character in "_-" for character in name)
        text += ("." if text else "") + (name if is_bare and name.isascii() else json.dumps(name, ensure_ascii=False))
    return text


def show(value: object) -> str:
    """A value as it stands in TOML, shortened."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isfinite(value):
        text = f"{value:.10g}"
        return text if any(mark in text for mark in ".e") else text + ".0"
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(show(element) for element in value) + "]"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{name} = {show(element)}" for name, element in value.items()) + "}"
    else:
        text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS_MAX else text[: SHOWN_CHARACTERS_MAX - 4] + " ..."


def number(value: float) -> str:
    """A number for a sentence, without the dust of binary fractions: 0.1, not 0.09999999999999999."""
    return f"{value:.10g}"


def or_list(names: list[str]) -> str:
    """`"a", "b" or "c"`."""
    quoted = [f'"{name}"' for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


class Findings:
    """The faults found so far. `source` and `lines` are empty for a configuration that was built in code."""

    def __init__(self, source: str = "", lines: Mapping[Path, int] | None = None) -> None:
        self._source = source
        self._lines = lines if lines is not None else {}
        self._refused: set[Path] = set()
        self._problems: list[tuple[int, str]] = []

    def refuse(self, path: Path, message: str, *also: Path) -> None:
        """Notes a fault of `path`. Where the file does not hold that key, the line is that of the first of `also`."""
        self._refused.add(path)
        line = next((self._lines[place] for place in (path, *also) if place in self._lines), 0)
        ancestor = path
        while not line and ancestor:
            ancestor = ancestor[:-1]
            line = self._lines.get(ancestor, 0)
        where = f"{self._source}:{line or 1}: " if self._source else ""
        self._problems.append((line, where + message.replace("\n", " ")))

    def is_sound(self, *paths: Path) -> bool:
        """True when none of the paths, nor what holds them, was refused: only then may they be compared."""
        if not self._refused:
            return True
        return not any(path[:length] in self._refused for path in paths for length in range(1, len(path) + 1))

    def named(self, path: Path, value: object) -> str:
        """`key = value`, the value hidden where it is a secret, with a remark where the file does not say it."""
        text = f"{dotted(path)} = {'(hidden)' if path in SECRETS else show(value)}"
        return text if path in self._lines or not self._source else f"{text} (the default)"

    def named_at(self, path: Path, value: object) -> str:
        """`key = value (line 10)`: for the other value of a conflict."""
        text = self.named(path, value)
        return f"{text} (line {self._lines[path]})" if path in self._lines else text

    def problems(self) -> list[str]:
        """All faults in the order of their lines, one line of text each."""
        return [text for _, text in sorted(self._problems, key=lambda problem: problem[0])]

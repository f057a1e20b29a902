"""On which line of a TOML text each key stands. `tomllib` reads the values but forgets where they were.

The scanner walks over text that tomllib has already accepted, so it checks nothing: it only has to know where keys,
strings and brackets begin and end. A key's path is a tuple of names, with the index of the element inside an array (of
tables or inline), counted from 0: `("cron", "jobs", 3, "schedule")`. Where a key is only implied (`[a.b]` implies
`a`), its line is that of the first header or key which implies it.
"""

from __future__ import annotations

import re
import tomllib

Path = tuple[str | int, ...]
"""Names of keys and indices of elements, from the root down."""

_BLANK = re.compile(r"[ \t]*")
_FILLER = re.compile(r"(?:[ \t\n\r]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BASIC = re.compile(r'"(?:[^"\\]|\\.)*"')
_LITERAL = re.compile(r"'[^']*'")
_BASIC_LONG = re.compile(r'"""(?:[^"\\]|\\.|"{1,2}(?!"))*"{3,5}', re.DOTALL)
_LITERAL_LONG = re.compile(r"'''(?:[^']|'{1,2}(?!'))*'{3,5}", re.DOTALL)
_SCALAR = re.compile(r"[^,\]}#\n]+")


def key_lines(text: str) -> dict[Path, int]:
    """Line, counted from 1, of every table, key and element. `text` must be valid TOML."""
    return _Scanner(text.replace("\r\n", "\n")).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._line = 1
        self._counted_to = 0
        self._lines: dict[Path, int] = {}
        self._elements: dict[Path, int] = {}
        """How many `[[headers]]` each array of tables has had."""

    def scan(self) -> dict[Path, int]:
        base: Path = ()
        while True:
            self._skip(_FILLER)
            if self._position >= len(self._text):
                return self._lines
            if self._text[self._position] == "[":
                base = self._header()
            else:
                self._pair(base)

    def _header(self) -> Path:
        """Reads `[a.b]` or `[[a.b]]`; the path of the table that it opens."""
        is_array = self._text.startswith("[[", self._position)
        self._position += 2 if is_array else 1
        path: Path = ()
        names = self._key()
        for number, name in enumerate(names, start=1):
            path = (*path, name)
            if is_array and number == len(names):
                self._elements[path] = self._elements.get(path, 0) + 1
            self._mark(path)
            if path in self._elements:
                # A name in the middle of a header means the latest element of that array.
                path = (*path, self._elements[path] - 1)
                self._mark(path)
        self._position += 2 if is_array else 1
        return path

    def _pair(self, base: Path) -> None:
        """Reads `key = value`."""
        path = base
        for name in self._key():
            path = (*path, name)
            self._mark(path)
        self._skip(_BLANK)
        self._position += 1
        self._skip(_BLANK)
        self._value(path)

    def _key(self) -> list[str]:
        """Reads a key with its dots; leaves the position behind it."""
        names = []
        while True:
            self._skip(_BLANK)
            quote = self._text[self._position]
            if quote in "\"'":
                quoted = self._skip(_BASIC if quote == '"' else _LITERAL)
                # tomllib knows the escapes.
                names.append(str(tomllib.loads(f"key = {quoted}")["key"]))
            else:
                names.append(self._skip(_BARE_KEY))
            self._skip(_BLANK)
            if not self._text.startswith(".", self._position):
                return names
            self._position += 1

    def _value(self, path: Path) -> None:
        """Reads a value of any kind, and marks what is inside it."""
        character = self._text[self._position]
        if self._text.startswith('"""', self._position):
            self._skip(_BASIC_LONG)
        elif self._text.startswith("'''", self._position):
            self._skip(_LITERAL_LONG)
        elif character == '"':
            self._skip(_BASIC)
        elif character == "'":
            self._skip(_LITERAL)
        elif character == "[":
            self._array(path)
        elif character == "{":
            self._inline_table(path)
        else:
            self._skip(_SCALAR)

    def _array(self, path: Path) -> None:
        self._position += 1
        index = 0
        while True:
            self._skip(_FILLER)
            if self._text[self._position] == "]":
                self._position += 1
                return
            if self._text[self._position] == ",":
                self._position += 1
                continue
            self._mark((*path, index))
            self._value((*path, index))
            index += 1

    def _inline_table(self, path: Path) -> None:
        self._position += 1
        while True:
            self._skip(_FILLER)
            if self._text[self._position] == "}":
                self._position += 1
                return
            if self._text[self._position] == ",":
                self._position += 1
                continue
            self._pair(path)

    def _skip(self, pattern: re.Pattern[str]) -> str:
        """Moves behind what the pattern matches here, and returns it."""
        match = pattern.match(self._text, self._position)
        if match is None:
            raise AssertionError(f"line {self._line}: not valid TOML; tomllib must read the text first")
        self._position = match.end()
        return match[0]

    def _mark(self, path: Path) -> None:
        """Notes the line of the current position, unless the path was met before."""
        self._line += self._text.count("\n", self._counted_to, self._position)
        self._counted_to = self._position
        self._lines.setdefault(path, self._line)

"""Holds the line on sizes: modules of 400 lines, test modules of 700, functions of 70. (ruff holds that of lines.)

What is larger today may stay, in tools/data/tidy_ratchet.json, and may not grow: the ratchet turns one way only.
`tidy.py --update` writes the file again; it never raises a number that is there.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RATCHET = ROOT / "tools" / "data" / "tidy_ratchet.json"
MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
TEST_MODULE_LINES_MAX = 700
"""Tests of one thing stay in one module; nobody reads that from the first line to the last."""
FOLDERS = ("coordinator", "worker_agent", "tests", "tools")


def sources(root: Path) -> list[Path]:
    """Own Python files, without generated ones."""
    found = [path for folder in FOLDERS for path in (root / folder).rglob("*.py")]
    return sorted(path for path in found if "_pb2" not in path.name)


def measure(path: Path, name: str) -> dict[str, int]:
    """What is over its limit in one file: what it is, and how large it is."""
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    over: dict[str, int] = {}
    if lines > (TEST_MODULE_LINES_MAX if name.startswith("tests/") else MODULE_LINES_MAX):
        over[f"{name}: module"] = lines
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                over[f"{name}: function {node.name}"] = length
    return over


def violations(measured: dict[str, int], allowed: dict[str, int]) -> list[str]:
    """One line for everything that is larger than it may be."""
    limits = f"limits: module {MODULE_LINES_MAX}, test module {TEST_MODULE_LINES_MAX}, function {FUNCTION_LINES_MAX}"
    return [
        f"{subject} has {size} lines"
        + (f"; it had {allowed[subject]} and may not grow" if subject in allowed else f" ({limits})")
        for subject, size in sorted(measured.items())
        if size > allowed.get(subject, 0)
    ]


def main(arguments: list[str]) -> int:
    """0 when nothing is larger than it may be."""
    measured: dict[str, int] = {}
    files = sources(ROOT)
    for path in files:
        measured |= measure(path, path.relative_to(ROOT).as_posix())
    allowed: dict[str, int] = json.loads(RATCHET.read_text()) if RATCHET.exists() else {}
    if arguments == ["--update"]:
        held = {subject: min(size, allowed.get(subject, size)) for subject, size in sorted(measured.items())}
        RATCHET.write_text(json.dumps(held, indent=2) + "\n")
        allowed = held
    found = violations(measured, allowed)
    for line in found:
        print(line, file=sys.stderr)
    print(f"{len(files)} files, {len(found)} over a limit, {len(allowed)} held by the ratchet")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

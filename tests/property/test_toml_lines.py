"""The scanner of lines agrees with tomllib on every document."""

from __future__ import annotations

import json
import tomllib
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.configuration.toml_lines import Path, key_lines

TEXT = st.text(st.sampled_from("ab\"'\\#[]{}=,.\n\t é"), max_size=12)
NAMES = st.one_of(st.text("abAB09_-", min_size=1, max_size=6), TEXT)
SCALARS = st.one_of(TEXT, st.integers(-(10**6), 10**6), st.booleans(), st.dates(), st.datetimes(), st.floats(-1e6, 1e6))


@st.composite
def written_text(draw: st.DrawFn, text: str) -> str:
    """A text in one of the four ways in which TOML can hold it."""
    ways = [json.dumps(text, ensure_ascii=False)]
    if "'" not in text and "\n" not in text:
        ways.append(f"'{text}'")
    ways.append('"""\n' + text.rstrip('"').replace("\\", "\\\\").replace('"""', '""\\"') + '"""')
    if "''" not in text:
        ways.append("'''\n" + text.rstrip("'") + "'''")
    return draw(st.sampled_from(ways))


@st.composite
def written_key(draw: st.DrawFn, name: str) -> str:
    """A key bare or in quotes."""
    ways = [json.dumps(name, ensure_ascii=False)]
    if name and all(character.isascii() and (character.isalnum() or character in "_-") for character in name):
        ways.append(name)
    elif "'" not in name and "\n" not in name:
        ways.append(f"'{name}'")
    return draw(st.sampled_from(ways))


@st.composite
def written_value(draw: st.DrawFn, depth: int = 2) -> str:
    """A value: a scalar, an array over several lines with comments, or an inline table."""
    kind = draw(st.sampled_from(["scalar", "array", "table"] if depth else ["scalar"]))
    if kind == "array":
        elements = draw(st.lists(written_value(depth - 1), max_size=3))
        separator = draw(st.sampled_from([", ", ",\n  ", ", # a ] comment\n"]))
        return "[" + separator.join(elements) + draw(st.sampled_from(["]", "\n]", " # [\n]"]))
    if kind == "table":
        names = draw(st.lists(NAMES, max_size=3, unique=True))
        return "{" + ", ".join(f"{draw(written_key(name))} = {draw(written_value(depth - 1))}" for name in names) + "}"
    scalar = draw(SCALARS)
    match scalar:
        case str():
            return draw(written_text(scalar))
        case bool():
            return str(scalar).lower()
        case int() | float():
            return repr(scalar)
        case _:
            return str(scalar)


@st.composite
def documents(draw: st.DrawFn) -> str:
    """A document with tables, arrays of tables, tables inside their elements, and dotted keys."""
    parts: list[str] = []
    for number in range(draw(st.integers(0, 4))):
        unique = f"t{number}"
        name = draw(written_key(draw(NAMES) + unique))
        headers = draw(
            st.sampled_from(
                [
                    [f"[{name}]"],
                    [f"[ {name} . sub ]"],
                    [f"[[{name}]]", f"[{name}.inner]", f"[[ {name} ]]"],
                    [f"[[{name}.x]]"],
                ]
            )
        )
        for header in headers:
            parts.append(header + draw(st.sampled_from(["", " # [comment]", "\n\n"])))
            for key in draw(
                st.lists(NAMES.filter(lambda name: name not in ("sub", "inner", "x")), max_size=3, unique=True)
            ):
                written = draw(written_key(key))
                dotted = draw(st.sampled_from([written, f"{written} . deep", f"{written}.a.'b.c'"]))
                parts.append(f"{dotted} = {draw(written_value())}")
    newline = draw(st.sampled_from(["\n", "\r\n"]))
    return newline.join(parts) if newline == "\n" or "\n" not in "".join(parts) else "\n".join(parts)


def paths_of(value: Any, path: Path = ()) -> set[Path]:
    """Every key and element below a value, as tomllib reads it."""
    found: set[Path] = set()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        found |= {(*path, name)} | paths_of(inner, (*path, name))
    return found


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(documents())
def test_every_key_has_a_line_and_no_other_has(text: str) -> None:
    """The scanner finds exactly the keys and elements that tomllib finds, on lines that exist and in their order."""
    document = tomllib.loads(text)
    lines = key_lines(text)
    assert set(lines) == paths_of(document)
    assert all(1 <= line <= text.count("\n") + 1 for line in lines.values())
    assert all(lines[path[:-1]] <= line for path, line in lines.items() if len(path) > 1)


@settings(deadline=None)
@given(st.lists(written_value(), min_size=1, max_size=6))
def test_the_line_is_where_the_key_is(values: list[str]) -> None:
    """Whatever stands in the values before it, a key's line is that of its text."""
    text, expected = "", {}
    for number, value in enumerate(values):
        expected[f"key{number}"] = text.count("\n") + 1
        text += f"key{number} = {value}\n"
    lines = key_lines(text)
    assert {name: lines[(name,)] for name in expected} == expected

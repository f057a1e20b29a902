"""clusterctl state: what users keep in the cluster, seen and changed one user at a time."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import click

from coordinator.cli.session import Group, Session, pass_session
from coordinator.cli.structure import Plain
from coordinator.cli.table import Column, facts, table
from coordinator.cli.words import hash_text, size
from coordinator.client.state_types import Entry, Scan, UserDescription
from coordinator.model.errors import RefusalReason, Refused

COLUMNS = (Column("KEY"), Column("VERSION", right=True), Column("BYTES", right=True), Column("VALUE", wrap=True))
PAGE_ITEMS_MAX = 1_000
SHOWN_CHARACTERS = 200
"""So much of a value is shown in a table."""

expected_version = click.option(
    "--expected-version",
    type=click.IntRange(min=0),
    help="Only if the key has this version now; 0: only if it does not exist.",
)
stale = click.option(
    "--stale", is_flag=True, help="Ask any replica, which may be behind; the answer says by how much at most."
)


def entry_structure(entry: Entry) -> dict[str, Plain]:
    """One key for scripts: its value as `value` when it is UTF-8 text, else as `value_base64`."""
    found: dict[str, Plain] = {"key": entry.key, "version": entry.version}
    try:
        found["value"] = entry.value.decode("utf-8")
    except UnicodeDecodeError:
        found["value_base64"] = base64.b64encode(entry.value).decode("ascii")
    return found


def age_text(age_s: float) -> str:
    """What a stale answer is worth, for people."""
    return f"at most {age_s:.1f} s old"


def value_text(value: bytes) -> str:
    """A value for people, on one line."""
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        return f"(binary) {value[:16].hex(' ')}{' ...' if len(value) > 16 else ''}"
    shown = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text[:SHOWN_CHARACTERS])
    return shown + (" ..." if len(text) > SHOWN_CHARACTERS else "") if shown else "(empty)"


def entries_table(entries: list[Entry]) -> str:
    """Keys for people."""
    rows = [[entry.key, str(entry.version), str(len(entry.value)), value_text(entry.value)] for entry in entries]
    return table(COLUMNS, rows) if rows else "no key"


def description_text(user: str, about: UserDescription) -> str:
    """How much a user keeps, for people."""
    return facts(
        [
            ("user", user),
            ("hash", hash_text(about.key_hash)),
            ("shard", str(about.shard_id)),
            ("keys", f"{about.keys} of {about.keys_max}"),
            ("size", f"{size(about.bytes)} of {size(about.bytes_max)}"),
        ]
    )


@click.group(cls=Group)
def state() -> None:
    """See and change what a user keeps: a small ordered map of keys and values.

    \b
    Begin with:
      clusterctl state put ann name Ann
      clusterctl state get ann name
      clusterctl state scan ann
    """


@state.command("get")
@click.argument("user")
@click.argument("key")
@stale
@click.option("--raw", is_flag=True, help="Print the bytes of the value and nothing else, to redirect them.")
@pass_session
def get_key(session: Session, user: str, key: str, stale: bool, raw: bool) -> None:
    """Show one key of USER. With -o json the value is text, or base64 in value_base64 when it is no text; with --stale
    age_s says how old the answer is at most.

    \b
    Examples:
      clusterctl state get ann name
      clusterctl state get ann photo --raw > photo.jpg
      clusterctl state get ann name -o json | jq -r .version
    """
    found = session.state().read(user, [key], stale=stale)
    entry = next(iter(found.entries), None)
    if entry is None:
        advice = f"`clusterctl state scan {user}` lists those that there are"
        raise Refused(RefusalReason.NOT_FOUND, f"user {user} has no key {key!r}; {advice}")
    if raw:
        sys.stdout.buffer.write(entry.value)
        return
    plain = entry_structure(entry) | ({"age_s": found.age_s} if stale else {})
    text = entries_table([entry]) + (f"\n{age_text(found.age_s)}" if stale else "")
    session.show(plain, lambda: text)


@state.command("put", short_help="Store a value under a key of USER.")
@click.argument("user")
@click.argument("key")
@click.argument("value", required=False)
@click.option("--file", "path", type=click.Path(path_type=Path), help="Take the value from a file.")
@expected_version
@pass_session
def put_key(
    session: Session, user: str, key: str, value: str | None, path: Path | None, expected_version: int | None
) -> None:
    """Store VALUE under a key of USER; "-" takes it from standard input.

    \b
    Examples:
      clusterctl state put ann name Ann
      clusterctl state put ann name Anna --expected-version 1     only if nobody changed it
      clusterctl state put ann photo --file photo.jpg
      date | clusterctl state put ann seen -
    """
    content = _content(value, path)
    written = session.state().put(user, key, content, expected_version=expected_version)
    answer: dict[str, Plain] = {"key": key, "version": written.version}
    session.show(answer, lambda: f"stored {len(content)} bytes as version {written.version}")


@state.command("delete")
@click.argument("user")
@click.argument("key")
@expected_version
@pass_session
def delete_key(session: Session, user: str, key: str, expected_version: int | None) -> None:
    """Remove a key of USER; one that is not there is no error.

    \b
    Examples:
      clusterctl state delete ann draft
      clusterctl state delete ann draft --expected-version 7
    """
    written = session.state().delete(user, key, expected_version=expected_version)
    answer: dict[str, Plain] = {"key": key, "version": written.version}
    session.show(answer, lambda: f"removed, as version {written.version}")


@state.command("scan")
@click.argument("user")
@click.option("--prefix", default="", help="Only keys that begin with this.")
@click.option("--from", "from_key", default="", metavar="KEY", help="Begin at this key.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many keys; all of them when it is left out.")
@stale
@pass_session
def scan_keys(
    session: Session, user: str, prefix: str, from_key: str, limit: int | None, stale: bool
) -> None:
    """List the keys of USER, in the order of their bytes. Each page of up to 1,000 keys is as of one moment.

    \b
    Examples:
      clusterctl state scan ann
      clusterctl state scan ann --prefix history/ --limit 20
      clusterctl state scan ann -o json | jq -r '.entries[].key'
    """
    entries: list[Entry] = []
    ages_s: list[float] = []
    while not ages_s or (from_key and (limit is None or len(entries) < limit)):
        page_size = min(PAGE_ITEMS_MAX, limit - len(entries) if limit is not None else PAGE_ITEMS_MAX)
        page = session.state().scan_page(Scan(user, from_key, prefix, page_size, stale))
        entries += page.entries
        ages_s.append(page.age_s)
        from_key = page.next_key
    answer: dict[str, Plain] = {"user": user, "entries": [entry_structure(entry) for entry in entries]}
    if stale:
        answer["age_s"] = max(ages_s)
    text = entries_table(entries) + (f"\n{age_text(max(ages_s))}" if stale else "")
    session.show(answer, lambda: text)


@state.command("describe")
@click.argument("user")
@pass_session
def describe_user(session: Session, user: str) -> None:
    """Show how much USER keeps and may keep, and in which shard.

    \b
    Example:
      clusterctl state describe ann
    """
    about = session.state().describe_user(user)
    answer: dict[str, Plain] = {
        "user": user,
        "key_hash": about.key_hash,
        "shard_id": about.shard_id,
        "keys": about.keys,
        "keys_max": about.keys_max,
        "bytes": about.bytes,
        "bytes_max": about.bytes_max,
    }
    session.show(answer, lambda: description_text(user, about))


def _content(value: str | None, path: Path | None) -> bytes:
    """The value to store. Raises click's usage errors."""
    if (value is None) == (path is None):
        raise click.UsageError("name the value: as VALUE, as - for standard input, or with --file, one of them")
    if path is not None:
        try:
            return path.read_bytes()
        except OSError as error:
            raise click.BadParameter(f"{path}: cannot be read: {error.strerror}", param_hint="--file") from None
    if value == "-":
        return sys.stdin.buffer.read()
    # What the shell passed that is no UTF-8 arrives as it was.
    return (value or "").encode("utf-8", "surrogateescape")



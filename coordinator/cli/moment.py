"""Times on the command line: `2026-11-23 19:55:47+00:00` as the tables print them, or how long ago, `2h30m`."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from coordinator.cli.session import now_unix_ms

_AGO = re.compile(r"(?:(\d{1,6})d)?(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,9})s)?", re.ASCII)
_UNITS_S = (86_400, 3_600, 60, 1)

if TYPE_CHECKING:
    MomentType = click.ParamType[int]
else:
    # Not generic in every version of click that will do.
    MomentType = click.ParamType


class Moment(MomentType):
    """A time, as milliseconds since 1970. Without an offset from UTC it is read in the local zone."""

    name = "time"

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> int:
        """The milliseconds; fails with one line."""
        text = str(value).strip()
        ago = _AGO.fullmatch(text)
        if text and ago is not None:
            return now_unix_ms() - 1_000 * sum(
                int(count or 0) * unit_s for count, unit_s in zip(ago.groups(), _UNITS_S, strict=True)
            )
        try:
            moment = datetime.fromisoformat(text).astimezone(UTC)
        except (ValueError, OverflowError, OSError):
            self.fail(
                f'{text!r} is no time; write "2026-11-23 19:55:47+00:00", "2026-11-23 19:55" (local), or how long '
                'ago: "90s", "2h30m", "1d"',
                parameter,
                context,
            )
        return round(moment.timestamp() * 1_000)


MOMENT = Moment()

"""Windows: half-open UTC intervals `[start, end)` on a fixed grid, and what their age allows.

Invariants: the grid is counted from the epoch, so it does not depend on when the process runs; a window length divides
a day, so no window crosses midnight UTC; every timestamp is an aware datetime in UTC.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import Enum

from app.core.errors import AppError, LeaseLost, Permanent, Rejected, Transient

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
HOUR_SECONDS = 3_600
DAY_SECONDS = 86_400
FAILURES_IN_A_ROW = 2
WIDTHS = {"Y": 4, "m": 2, "d": 2, "j": 3}
log = logging.getLogger(__name__)


class Age(Enum):
    """OPEN: rows still arrive. SETTLING: late rows are still accepted. DUE: it can be closed."""

    OPEN = "open"
    SETTLING = "settling"
    DUE = "due"


@dataclass(frozen=True, slots=True, order=True)
class Window:
    """`[start, end)`, both aware UTC, start before end."""

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        if self.start.utcoffset() != timedelta(0) or self.end.utcoffset() != timedelta(0):
            raise ValueError("a window's bounds must be aware UTC datetimes")
        if self.start >= self.end:
            raise ValueError(f"a window must not be empty: {self.start} to {self.end}")

    @property
    def seconds(self) -> int:
        """Length in whole seconds."""
        return int((self.end - self.start).total_seconds())

    def __str__(self) -> str:
        return f"{self.start:%Y-%m-%dT%H:%M:%SZ}/{self.end:%Y-%m-%dT%H:%M:%SZ}"


def named_day(text: str, date_format: str) -> date | None:
    """The UTC day that `date_format` writes as `text`, None if there is none.

    Directives have a fixed width and may be repeated, as in `%Y/%Y-%m-%d`, which `strptime` does not accept.
    """
    found: dict[str, str] = {}
    wider = 0
    for directive in re.finditer("%([Ymdj])", date_format):
        width, at = WIDTHS[directive[1]], directive.start() + wider
        found[directive[1]] = text[at : at + width]
        wider += width - len(directive[0])
    names = "Yj" if "j" in found else "Ymd"
    try:
        day = datetime.strptime(" ".join(found[name] for name in names), " ".join(f"%{name}" for name in names)).date()  # noqa: DTZ007 - a day of UTC
    except (ValueError, KeyError):
        return None
    return day if day.strftime(date_format) == text else None


def whole_second(at: datetime) -> str:
    """`YYYY-MM-DDTHH:MM:SSZ`."""
    return f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def utc_instant(text: str) -> datetime:
    """The aware UTC datetime of an ISO 8601 text, which is in UTC when it has no offset. Raises ValueError."""
    at = datetime.fromisoformat(text)
    try:
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except OverflowError as error:  # an offset at the limits of the datetime range
        raise ValueError(text) from error


def instant_text(at: datetime | None) -> str | None:
    """`YYYY-MM-DDTHH:MM:SS.mmmZ`; None for None."""
    return None if at is None else at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def floor_to(instant: datetime, seconds: int) -> datetime:
    """The start of the grid cell of `seconds` that contains `instant`."""
    elapsed = (instant - EPOCH) // timedelta(seconds=seconds)
    return EPOCH + timedelta(seconds=seconds * elapsed)


def window_at(instant: datetime, seconds: int) -> Window:
    """The window of length `seconds` that contains `instant`."""
    start = floor_to(instant, seconds)
    return Window(start, start + timedelta(seconds=seconds))


def windows_between(start: datetime, end: datetime, seconds: int) -> Iterator[Window]:
    """Every window that overlaps `[start, end)`, oldest first; none unless start is before end."""
    at, length = floor_to(start, seconds) if start < end else end, timedelta(seconds=seconds)
    while at < end:
        yield Window(at, at + length)
        at += length


def age_of(window: Window, now: datetime, grace_seconds: float) -> Age:
    """What may be done with `window` at `now`; the caller decides this before it reads the source."""
    if window.end > now:
        return Age.OPEN
    if window.end > now - timedelta(seconds=grace_seconds):
        return Age.SETTLING
    return Age.DUE


def refuse_future(span: Window, now: datetime) -> None:
    """Raise Rejected for a span to fill that starts in the future or ends after today: the year or day is wrong, and a
    result of `0 rows` would hide that.
    """
    if span.start >= now or span.end > next_midnight(now):
        raise Rejected(
            f"{span} lies in the future: it is {now:%Y-%m-%dT%H:%M:%SZ}",
            f"give a span that has begun and ends at {next_midnight(now):%Y-%m-%dT%H:%M:%SZ} or earlier",
        )


def next_midnight(now: datetime) -> datetime:
    """The first midnight UTC after `now`."""
    return floor_to(now, DAY_SECONDS) + timedelta(days=1)


class FailedWindows:
    """Failures of single windows of one partition. After two in a row the cause is probably not the windows: `stops` is
    then true, and the rest waits for the next run.
    """

    def __init__(self) -> None:
        self.first: AppError | None = None
        self._in_a_row = 0

    @property
    def stops(self) -> bool:
        """Whether to skip the remaining windows."""
        return self._in_a_row >= FAILURES_IN_A_ROW

    @contextmanager
    def one(self) -> Iterator[None]:
        """The work on one window. Its error is kept for later; a lost lease is raised at once."""
        try:
            yield
        except LeaseLost:
            raise
        except (Transient, Permanent, Rejected) as error:
            log.debug("one window fails, others go on: %s", error)
            self.first = self.first or error
            self._in_a_row += 1
        else:
            self._in_a_row = 0

    def check_outage(self) -> None:
        """Raise the first error if too many failed in a row."""
        if self.stops:
            self.check()

    def go_on(self) -> None:
        """Allow other windows to be tried despite earlier failures."""
        self._in_a_row = 0

    def check(self) -> None:
        """Raise the first error, once everything else is done."""
        if self.first is not None:
            raise self.first

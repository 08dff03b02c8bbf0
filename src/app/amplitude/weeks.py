"""The object of a week: a zip with one NDJSON entry, joined from the objects of its hours.

Invariants: it is a function of the records of its hours, so it can be made again at any time and a crash needs nothing;
it is made anew when a day of it is complete or one of its hours changed, and only then.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import BinaryIO, cast

from app.amplitude.weekly import WEEK, monday, name_of, weeks
from app.core.errors import Permanent
from app.core.ports import Checkpoints, Commit, Held, Record
from app.core.runs import Context
from app.core.window import DAY_SECONDS, Window, floor_to
from app.stores.objects import ObjectStore
from app.stores.raw_gaps import was_had
from app.stores.raw_objects import Keep, RawObject, in_place_of, keep

PIPELINE = "amplitude_weeks"
HOURS = "amplitude"
ZIP = "application/zip"
DAY_HOURS = 24
MAX_BYTES = 5 << 30


@dataclass(frozen=True, slots=True)
class Weeks:
    """Where weeks are made."""

    store: ObjectStore
    checkpoints: Checkpoints
    spool: Path

    def refresh(self, context: Context, source: str, days: Sequence[date]) -> int:
        """Bring the objects of the weeks of `days` up to date; the bytes that were stored."""
        if context.dry_run:
            return 0
        return sum(self._one(context, source, first) for first in sorted({monday(day) for day in days}))

    def hours(self, source: str, window: Window) -> Sequence[Record]:
        """The hours that the object of a week should hold: those of days that were pulled whole."""
        return _complete(self.checkpoints.records(HOURS, source, window.start, window.end))

    def mend(self, context: Context, source: str, window: Window, version: str) -> int:
        """Make the object of a week anew in place of that version; the bytes that were stored."""
        hours = self.hours(source, window)
        if not hours:
            span = f"--from {window.start:%Y-%m-%d} --to {window.end:%Y-%m-%d}"
            raise Permanent(f"no day of {source} {window} is known", f"python -m app backfill amplitude {span}")
        return self._store(context, source, window, in_place_of(version))

    def _one(self, context: Context, source: str, first: date) -> int:
        window = week_of(first)
        hours = self.hours(source, window)
        held = next(iter(self.checkpoints.records(PIPELINE, source, window.start, window.end)), None)
        if not hours or (held is not None and held.digest == _digest(hours)):
            return 0
        return self._store(context, source, window, keep)

    def _store(self, context: Context, source: str, window: Window, how: Keep) -> int:
        hours = self.hours(source, window)
        what = RawObject(
            PIPELINE, week_key(source, window), window, ZIP, sum(hour.rows for hour in hours), _digest(hours)
        )
        with tempfile.TemporaryFile(dir=self.spool) as file:
            file.writelines(weeks(self._streams(context, hours), [window.start.date()]))
            _check_size(what.key, file.tell())
            held = how(self.store, cast("BinaryIO", file), what)
        record = _record(what, held, hours)
        self.checkpoints.commit(PIPELINE, source, Commit((record,)), context.lease)
        return record.size_bytes

    def _streams(self, context: Context, hours: Sequence[Record]) -> Iterator[tuple[datetime, BinaryIO]]:
        for hour in hours:
            context.stop.check()
            if not hour.version or not was_had(hour):
                continue  # an hour without events has no object, nor has one that was set aside
            with ExitStack() as opened:
                stream = opened.enter_context(self.store.open(hour.key, hour.version))
                if stream is None:
                    raise Permanent(
                        f"{hour.key} is gone, and with it the week cannot be made again",
                        f"python -m app verify amplitude --from {hour.window.start:%Y-%m-%dT%H} "
                        f"--to {hour.window.end:%Y-%m-%dT%H} --heal",
                    )
                yield hour.window.start, stream


def week_of(day: date) -> Window:
    """The ISO week of a day."""
    start = datetime.combine(monday(day), time(), UTC)
    return Window(start, start + WEEK)


def week_key(source: str, window: Window) -> str:
    """`amplitude/{source}/{year}_week_{week}.zip`."""
    return f"{HOURS}/{source}/{name_of(window.start.date())}.zip"


def _digest(hours: Sequence[Record]) -> str:
    return hashlib.sha256("".join(f"{hour.window}{hour.digest}" for hour in hours).encode()).hexdigest()


def _record(what: RawObject, held: Held, hours: Sequence[Record]) -> Record:
    return Record(
        window=what.window,
        part=0,
        key=what.key,
        version=held.version,
        digest=what.digest,
        rows=what.rows,
        size_bytes=held.size_bytes,
        source_cells=len(hours),
        min_at=hours[0].window.start,
        max_at=hours[-1].window.end,
        closed=all(hour.closed for hour in hours) and hours[-1].window.end == what.window.end,
    )


def _complete(records: Sequence[Record]) -> Sequence[Record]:
    """Hours of days that were pulled whole. An hour that waits is none; one that was set aside is not waited for."""
    days: dict[datetime, list[Record]] = {}
    for record in records:
        if not was_had(record) and not record.closed:
            continue
        days.setdefault(floor_to(record.window.start, DAY_SECONDS), []).append(record)
    return [record for day in sorted(days) for record in days[day] if len(days[day]) == DAY_HOURS]


def _check_size(key: str, size_bytes: int) -> None:
    if size_bytes > MAX_BYTES:
        raise Permanent(
            f"{key}: {size_bytes} bytes are more than the 5 GiB that one upload may have",
            "take the objects of its hours, which hold all of it; nothing is missing there",
        )


def days_of(span: Window) -> list[date]:
    """The days that a span touches."""
    first, last = span.start.date(), (span.end - timedelta(microseconds=1)).date()
    return [first + timedelta(days=number) for number in range((last - first).days + 1)]

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
from app.core.ports import Checkpoints, Commit, Record
from app.core.runs import Context
from app.core.window import DAY_SECONDS, Window, floor_to
from app.stores.objects import ObjectStore
from app.stores.raw_objects import RawObject, keep

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

    def _one(self, context: Context, source: str, first: date) -> int:
        start = datetime.combine(first, time(), UTC)
        window = Window(start, start + WEEK)
        hours = _complete(self.checkpoints.records(HOURS, source, window.start, window.end))
        held = next(iter(self.checkpoints.records(PIPELINE, source, window.start, window.end)), None)
        digest = hashlib.sha256("".join(f"{hour.window}{hour.digest}" for hour in hours).encode()).hexdigest()
        if not hours or (held is not None and held.digest == digest):
            return 0
        record = self._store(context, source, window, hours, digest)
        self.checkpoints.commit(PIPELINE, source, Commit((record,)), context.lease)
        return record.size_bytes

    def _store(self, context: Context, source: str, window: Window, hours: Sequence[Record], digest: str) -> Record:
        rows = sum(hour.rows for hour in hours)
        key = f"{HOURS}/{source}/{name_of(window.start.date())}.zip"
        with tempfile.TemporaryFile(dir=self.spool) as file:
            file.writelines(weeks(self._streams(context, hours), [window.start.date()]))
            _check_size(key, file.tell())
            held = keep(self.store, cast("BinaryIO", file), RawObject(PIPELINE, key, window, ZIP, rows, digest))
        return Record(
            window=window,
            part=0,
            key=key,
            version=held.version,
            digest=digest,
            rows=rows,
            size_bytes=held.size_bytes,
            source_cells=len(hours),
            min_at=hours[0].window.start,
            max_at=hours[-1].window.end,
            closed=all(hour.closed for hour in hours) and hours[-1].window.end == window.end,
        )

    def _streams(self, context: Context, hours: Sequence[Record]) -> Iterator[tuple[datetime, BinaryIO]]:
        for hour in hours:
            context.stop.check()
            if not hour.version:
                continue  # an hour without events has no object
            with ExitStack() as opened:
                stream = opened.enter_context(self.store.open(hour.key, hour.version))
                if stream is None:
                    raise Permanent(
                        f"{hour.key} is gone, and with it the week cannot be made again",
                        f"python -m app backfill amplitude --from {hour.window.start:%Y-%m-%dT%H} "
                        f"--to {hour.window.end:%Y-%m-%dT%H}",
                    )
                yield hour.window.start, stream


def _complete(records: Sequence[Record]) -> Sequence[Record]:
    """Hours of days that were pulled whole."""
    days: dict[datetime, list[Record]] = {}
    for record in records:
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

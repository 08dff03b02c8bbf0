"""The hours of one source in one run: which are due, which are looked at once more; each lands before it counts.

Invariants: hours are pulled in order from the cursor on, and the cursor moves over landed ones only, also over empty
ones; what lies before it is only added to. An hour is due two and a half hours after its end, since the service needs
two; asked earlier, it would give a part of it that looks like all.
"""

import random
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from pathlib import Path

from app.amplitude.archive import Archive, opened
from app.amplitude.client import Fetched, Patience, Project
from app.amplitude.landing import HOUR, NAME, Grounds, Hour, land
from app.amplitude.weekly import monday
from app.amplitude.weeks import Weeks, days_of
from app.core.ports import Checkpoints, Commit, Record
from app.core.retry import RetryPolicy
from app.core.runs import Context, Report
from app.core.window import DAY_SECONDS, Window, floor_to
from app.stores.objects import ObjectStore
from app.stores.product_loading import Load
from app.stores.raw_objects import Keep

HOUR_SECONDS = 3600
DUE_AFTER = timedelta(hours=2, minutes=30)
AGAIN_AFTER = timedelta(hours=24)
AGAIN_DAYS = 14
STEP_HOURS = 7 * 24


@dataclass(frozen=True, slots=True)
class Places:
    """Where hours and what is known of them are kept."""

    checkpoints: Checkpoints
    store: ObjectStore
    load: Load
    spool: Path
    clock: Callable[[], datetime]
    policy: RetryPolicy
    lookback_days: int


@dataclass(frozen=True, slots=True)
class Mode:
    """How hours are pulled. `live`: the cursor moves. `again`: rows are loaded whatever is recorded."""

    live: bool = False
    again: bool = False


LIVE, AGAIN, ONCE_MORE = Mode(live=True), Mode(again=True), Mode()


@dataclass(frozen=True, slots=True)
class SourceRun:
    """One source in one run. Its methods raise what the ports and the service raise; what was committed stays."""

    places: Places
    context: Context
    source: str
    project: Project

    def bring(self) -> Report:
        """Pull what is due, look once more at what is old enough, make weeks anew. `more`: more is due."""
        now = self.places.clock()
        start = self.places.checkpoints.cursors(NAME).get(self.source) or self._begin(now)
        due = due_at(now)
        end = min(due, start + STEP_HOURS * HOUR)
        report = self._pull(Window(start, end), LIVE) if start < end else Report()
        report += self._look_again(now)
        recent = days_of(Window(min(start, now - timedelta(days=AGAIN_DAYS)), now))
        return report + self._make_weeks(recent) + Report(more=start < end < due and not self.context.dry_run)

    def fill(self, span: Window) -> Report:
        """Pull the hours of `span` up to the cursor again. The cursor does not move."""
        now = self.places.clock()
        cursor = self.places.checkpoints.cursors(NAME).get(self.source, due_at(now))
        start, end = floor_to(span.start, HOUR_SECONDS), min(_ceiling(span.end), cursor, due_at(now))
        if start >= end:
            return Report()
        return self._pull(Window(start, end), AGAIN) + self._make_weeks(days_of(Window(start, end)))

    def mend(self, archive: Archive, keep: Keep) -> Report:
        """Land the hour of an archive anew and store its object as `keep` does. The cursor does not move."""
        span = archive.span
        records = self.places.checkpoints.records(NAME, self.source, span.start, span.end)
        (hour,) = self._hours(span, archive, {record.window.start: record for record in records}, AGAIN)
        record, new = land(replace(self._grounds, keep=keep), archive, hour)
        return replace(self._commit(hour, record, new, AGAIN), windows=1) + self._make_weeks(days_of(span))

    def _begin(self, now: datetime) -> datetime:
        """The Monday of the week in which the lookback begins, so that every object of a week is a whole one."""
        day = floor_to(now - timedelta(days=self.places.lookback_days), DAY_SECONDS)
        start = day - (day.date() - monday(day.date()))
        if not self.context.dry_run:
            commit = Commit(cursor_at=start)
            self.places.checkpoints.commit(NAME, self.source, commit, self.context.lease)
        return start

    def _look_again(self, now: datetime) -> Report:
        """Each day once more, a day after its last hour was due: what the service added since is landed."""
        until = settled_at(now)
        since = until - timedelta(days=AGAIN_DAYS)
        days: dict[datetime, list[Record]] = {}
        for record in self.places.checkpoints.records(NAME, self.source, since, until):
            if not record.closed:
                days.setdefault(floor_to(record.window.start, DAY_SECONDS), []).append(record)
        report = Report()
        for hours in days.values():
            report += self._pull(Window(hours[0].window.start, hours[-1].window.end), ONCE_MORE)
        return report

    def _pull(self, span: Window, mode: Mode) -> Report:
        """Fetch the hours of `span` and land each."""
        # Jitter is no secret: any source of numbers serves.
        patience = Patience(self.places.policy, self.context.stop, random.random)
        records = self.places.checkpoints.records(NAME, self.source, span.start, span.end)
        known = {record.window.start: record for record in records}
        self.context.progress.advance(total=(span.end - span.start) // HOUR)
        report = Report()
        for fetched in self.project.fetch_all(span, patience):
            with closing(fetched):
                report += self._land_all(fetched, known, mode)
        return report

    @property
    def _grounds(self) -> Grounds:
        places = self.places
        return Grounds(places.store, places.load, places.spool, self.context.stop.check, self.context.dry_run)

    def _land_all(self, fetched: Fetched, known: Mapping[datetime, Record], mode: Mode) -> Report:
        stop, grounds = self.context.stop, self._grounds
        report = Report()
        with nullcontext() if fetched.file is None else opened(fetched.file, fetched.span) as archive:
            for hour in self._hours(fetched.span, archive, known, mode):
                stop.check()
                record, new = land(grounds, archive, hour)
                report += self._commit(hour, record, new, mode)
        return report

    def _hours(self, span: Window, archive: Archive | None, known: Mapping[datetime, Record], mode: Mode) -> list[Hour]:
        members = archive.hours() if archive is not None else {}
        settled = settled_at(self.places.clock())
        starts = [span.start + number * HOUR for number in range((span.end - span.start) // HOUR)]
        return [
            Hour(
                source=self.source,
                window=Window(start, start + HOUR),
                members=members.get(start, ()),
                record=known.get(start),
                past=not mode.live,
                again=mode.again,
                final=start < settled,
            )
            for start in starts
        ]

    def _commit(self, hour: Hour, record: Record, new: int, mode: Mode) -> Report:
        self.context.progress.advance(done=1, rows=new)
        changed = hour.record is None or record.version != hour.record.version
        if not self.context.dry_run and (changed or record != hour.record or mode.live):
            commit = Commit((record,), hour.window.end if mode.live else None)
            self.places.checkpoints.commit(NAME, self.source, commit, self.context.lease)
        if self.context.dry_run:
            return Report(rows=record.rows, bytes=record.size_bytes, windows=1) if changed else Report()
        late = 0 if mode.live or mode.again else new
        return Report(rows=new, bytes=record.size_bytes if changed else 0, windows=int(changed), late_rows=late)

    def _make_weeks(self, days: "list[date]") -> Report:
        weeks = Weeks(self.places.store, self.places.checkpoints, self.places.spool)
        return Report(bytes=weeks.refresh(self.context, self.source, days))


def due_at(now: datetime) -> datetime:
    """Hours that end until then can be asked for."""
    return floor_to(now - DUE_AFTER, HOUR_SECONDS)


def settled_at(now: datetime) -> datetime:
    """Days that end until then are looked at for the last time, be it for the first."""
    return floor_to(now - DUE_AFTER - AGAIN_AFTER, DAY_SECONDS)


def _ceiling(instant: datetime) -> datetime:
    whole = floor_to(instant, HOUR_SECONDS)
    return whole if whole == instant else whole + HOUR

"""Rows that arrive late with an old time of receipt: days are counted again once they were pulled, what lacks lands.

The service may deliver events above its quota later, under the time at which it received them. Invariants: once a day
each of the last days of receipt is exported with the one column that tells the hour; only hours that have more rows
than were recorded are pulled again; a day is asked for only while less than BUDGET of the day's calls are used.
"""

import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, BinaryIO

from app.appmetrica.client import SERVICE
from app.appmetrica.csv_rows import BadRow, CsvRows
from app.appmetrica.exports import Patience, asking, keep_question
from app.appmetrica.questions import received_in
from app.appmetrica.records import HOUR, check_columns, hour_of
from app.core.errors import LeaseLost, Permanent, Transient
from app.core.ledger import Tally, ledger_of
from app.core.ports import Commit, Record
from app.core.runs import Failure, Report
from app.core.window import DAY_SECONDS, Window, floor_to
from app.stores.raw_gaps import was_had

if TYPE_CHECKING:
    from app.appmetrica.hours import ResourceRun

RECOUNTED = "appmetrica_recount"
"""The pipeline whose records are days of receipt; `digest` is the day on which each was counted last."""
BUDGET = 0.5
DAY = timedelta(days=1)
log = logging.getLogger(__name__)


def recount(run: "ResourceRun", pipeline: str, unit: str) -> Report:
    """Count the days that were not counted today, oldest first, for as long as one run may wait for a file."""
    places, report = run.places, Report()
    began_at = places.clock()
    for day in _days(run, pipeline, began_at):
        waited_seconds = (places.clock() - began_at).total_seconds()
        if waited_seconds > places.polling.timeout_seconds:
            break
        if places.pulls.calls(SERVICE, places.clock()) >= BUDGET * places.daily_calls:
            log.info("%s: half of the day's calls are used, so days are not counted again", run.partition)
            break
        try:
            done, counted = _day(run, day, pipeline, unit)
        except LeaseLost:
            raise
        except (Transient, Permanent) as error:  # tomorrow again: a day that cannot be had must not hold up the others
            done, counted = True, Report(failures=(Failure(f"{run.partition} {day}", error.message, error.hint),))
        report += counted
        if not done:
            break
        today = f"{began_at:%Y-%m-%d}"
        record = Record(day, 0, "", "", today, 0, 0, 0, None, None, closed=True)
        places.checkpoints.commit(RECOUNTED, run.partition, Commit((record,)), run.context.lease)
    return report


def _days(run: "ResourceRun", pipeline: str, now: datetime) -> Iterator[Window]:
    """Days of receipt that were pulled and not counted today; of the first and the last one what was pulled."""
    checkpoints, today = run.places.checkpoints, floor_to(now, DAY_SECONDS)
    first, last = checkpoints.starts(pipeline).get(run.partition), checkpoints.cursors(pipeline).get(run.partition)
    since = today - run.places.recount_days * DAY
    counted = checkpoints.records(RECOUNTED, run.partition, since, today)
    done = {floor_to(record.window.start, DAY_SECONDS) for record in counted if record.digest == f"{now:%Y-%m-%d}"}
    for number in range(run.places.recount_days if first and last else 0):
        at = since + number * DAY
        start, end = max(at, first or at), min(at + DAY, last or at)
        if start < end and at not in done:
            yield Window(start, end)


def _day(run: "ResourceRun", day: Window, pipeline: str, unit: str) -> tuple[bool, Report]:
    """Count a day and pull what is missing; False when the service is still making a file."""
    places, resource = run.places, run.resource
    keys = replace(resource, columns=(resource.received,))
    question = received_in(run.service.application_id, keys, day, places.zone())
    export = keep_question(places.pulls, f"{run.partition}:recount", question, places.clock())
    # Jitter is no secret: any source of numbers serves.
    patience = Patience(run.context.stop, random.random)
    with asking(run.service, places.pulls, places.clock, export, fresh=True) as under_way:
        if under_way.wait(patience, places.polling) is not None:
            return False, Report()
        records = places.checkpoints.records(pipeline, run.partition, day.start, day.end)
        known = {record.window.start: record.source_cells for record in records}
        not_had = {record.window.start for record in records if not was_had(record)}  # left to a backfill
        counts = _counts(under_way.files, resource.received)
        asked_for = (at for at in counts if day.start <= at < day.end and at not in not_had)
        missing = {at: counts[at] - known.get(at, 0) for at in asked_for}
        report = Report()
        for span in _spans(sorted(at for at, number in missing.items() if number > 0)):
            rows = sum(missing[at] for at in missing if span.start <= at < span.end and missing[at] > 0)
            log.info("%s %s: the service has %d rows that were not there before", run.partition, span, rows)
            pulled = run.pull_late(span)
            if pulled.more:
                waiting = ledger_of(Tally(counted=rows, waiting=rows), unit=unit).of_partition(run.partition)
                return False, report + replace(pulled, more=False, ledger=waiting)
            report += pulled
        under_way.finish()
        return True, report


def _counts(files: Sequence[BinaryIO], received: str) -> Counter[datetime]:
    """Rows by the hour of their receipt."""
    counts = Counter[datetime]()
    for file in files:
        rows = CsvRows(file)
        check_columns(rows.header, {received})
        for row in rows:
            if not isinstance(row, BadRow) and (at := hour_of(row[rows.header.index(received)])) is not None:
                counts[at] += 1
    return counts


def _spans(hours: Sequence[datetime]) -> Iterator[Window]:
    """Hours, oldest first, as windows of neighbours."""
    held: Window | None = None
    for at in hours:
        if held is not None and held.end == at:
            held = Window(held.start, at + HOUR)
            continue
        if held is not None:
            yield held
        held = Window(at, at + HOUR)
    if held is not None:
        yield held

"""Size of the state: a year of hourly windows of 1,000 devices, with default retention.

    uv run python bench/bookkeeping.py [--devices 1000] [--days 365] [--record-days 14] [--asked]

Each simulated day commits what a day of closing commits: 24 records per device with the sums of eight fields, and the
/analytics summary of each object. Then expired data is removed as the reconcile does, and with `--asked`, as after
report requests, /analytics packs its data. Runs, request counts and totals are included. The size is that of the SQLite
file after a checkpoint; `--record-days 0` shows it without retention. The goal is for 1,000 devices; everything but
runs and request counts is scaled to that.
"""

import argparse
import json
import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measured import Goal

if TYPE_CHECKING:
    from app.core.runs import Lease

JOB = "influx_to_s3"
JOBS = (JOB, "influx_to_s3_reconcile", "dynamo_to_drive", "csv_inbox", "amplitude", "appmetrica", "s3_sweep")
FIELDS = ("voltage", "current", "power", "frequency", "temperature", "soc", "pressure", "status")
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
MB = 1_000_000


def record_of(device: int, at: datetime) -> Any:
    """A closed window with 3,600 rows, whose texts are as long as real ones and as hard to pack."""
    from app.core.pipeline import Record, Sums
    from app.core.windows import Window

    digest = sha256(f"{device} {at}".encode()).hexdigest()
    mean = 200 + int(digest[:6], 16) / 1e6
    sums = {name: Sums(3600, 3600 * mean, 3600 * mean, mean - 9.75, mean + 9.25) for name in FIELDS}
    return Record(
        window=Window(at, at + HOUR),
        part=0,
        key=f"telemetry/device_id=D{device:06d}/date={at:%Y/%m/%d}/export_{at:%H%M%S}.parquet",
        version=f'"{digest[:32]}"',
        digest=digest,
        rows=3600,
        size_bytes=150_000 + int(digest[:3], 16),
        source_cells=3600 * len(FIELDS),
        min_at=at,
        max_at=at + HOUR - timedelta(seconds=1),
        closed=True,
        fields=dict.fromkeys(FIELDS, 3600),
        source_digest=digest,
        sums=sums,
    )


def facts_of(record: Any) -> Any:
    """What /analytics sums of the object of a window."""
    from app.db.object_summaries import DaySummary, ObjectFacts

    device, first_us = record.key.split("=")[1].split("/")[0], int(record.window.start.timestamp()) * 1_000_000
    last_us, total = first_us + 3_599_000_000, record.sums["voltage"].total
    draw = random.Random(record.digest)
    latest = (last_us, *(round(draw.uniform(0, 400), 2) for _ in range(6)), "pump", "Plant-A", 0)
    sums = (total, 3600, round(draw.uniform(20, 90), 1), 3600 * draw.uniform(20, 90), 3600)
    part = DaySummary(json.dumps(device), first_us // 86_400_000_000, 3600, first_us, last_us, *sums, latest)
    return ObjectFacts(
        record.key, record.version, record.size_bytes, 3600, dict.fromkeys(FIELDS, "DOUBLE"), "", (part,)
    )


def commits(devices: int, day: datetime) -> Iterator[tuple[str, Any]]:
    """What closing the windows of a day commits."""
    from app.core.pipeline import Commit

    for device in range(devices):
        records = tuple(record_of(device, day + hour * HOUR) for hour in range(24))
        yield f"D{device:06d}", Commit(records, day + DAY, summaries=tuple(map(facts_of, records)))


def beside(state: Any, start: datetime) -> None:
    """As many runs as are remembered of each job, and a month of request counts."""
    from app.core.runs import Outcome, Report, Run

    for job in JOBS:
        for number in range(1100):
            at = start + number * timedelta(minutes=1)
            report = Report(rows=60_000, bytes=4_000_000, windows=1000, written_new_rows=60_000)
            state.runs.save(Run(f"{job}-{number:08x}", job, at, at + HOUR / 60, Outcome.OK, report, "", ""))
    for hour in range(31 * 24):
        at = start + hour * HOUR
        state.requests.add({"put": 60_000.0, "list": 1000.0, "get": 100.0}, at, at + HOUR / 2)


def simulated(folder: Path, given: argparse.Namespace) -> Mapping[str, int]:
    """Bytes by table and index after that many days."""
    from app.analytics.reports import merged
    from app.analytics.summaries import LOOSE_DAYS
    from app.db.state import open_state

    start = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - given.days * DAY
    with closing(open_state("", folder)) as state:
        found = state.leases.acquire(JOB, "bench", 86_400.0)
        if found is None:
            sys.exit("the lease is taken")
        lease: Lease = found
        with closing(sqlite3.connect(folder / "state.db")) as fast:
            fast.execute("PRAGMA journal_size_limit = 67108864")
        if given.asked:
            state.summaries.note_asked()
        names = [f"D{device:06d}" for device in range(given.devices)]
        began = time.monotonic()
        for number in range(given.days):
            day = start + number * DAY
            state.checkpoints.commit_all(JOB, list(commits(given.devices, day)), lease)
            before = day + DAY - given.record_days * DAY
            for name in names if given.record_days else ():
                state.checkpoints.retire(JOB, name, before, day + DAY, lease)
            if given.record_days:
                state.summaries.forget_unasked((before - datetime(1970, 1, 1, tzinfo=UTC)).days)
            loose = (day - datetime(1970, 1, 1, tzinfo=UTC)).days + 1 - LOOSE_DAYS
            while given.asked and state.summaries.pack(loose, lambda versions: [True] * len(versions), merged):
                pass
            if number % 30 == 29:
                sys.stderr.write(f"day {number + 1}, {time.monotonic() - began:.0f} s\n")
        beside(state, start)
    with closing(sqlite3.connect(folder / "state.db")) as file:
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return dict(file.execute("SELECT name, sum(pgsize) FROM dbstat GROUP BY name"))


def main() -> int:
    """Print what is how large; 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--record-days", type=int, default=14)
    parser.add_argument("--asked", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as name:
        folder = Path(name)
        by_name = simulated(folder, given)
        size = (folder / "state.db").stat().st_size
    asked = ", reports asked for" if given.asked else ""
    print(f"{given.devices:,} devices, {given.days} days, records for {given.record_days} days{asked}\n")
    print("| table or index | MB |\n|---|---|")
    for each, size_bytes in sorted(by_name.items(), key=lambda item: -item[1])[:10]:
        print(f"| {each} | {size_bytes / MB:.1f} |")
    fixed = sum(taken for each, taken in by_name.items() if "run" in each or "request" in each)
    whole = fixed + (size - fixed) * 1000 / given.devices
    print(f"| the state | {size / MB:.1f} |")
    goal = Goal("the state of 1,000 devices", whole / MB, 1000, at_least=False, unit=" MB")
    print(f"\n- {goal}")
    return 0 if goal.met else 1


if __name__ == "__main__":
    sys.exit(main())

"""What the programs that kill the two pulls share; see `kill_rounds`."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pulling import Clock, landed

HOUR = timedelta(hours=1)
DAYS = 3


def hours_before(now: datetime) -> list[datetime]:
    """The hours of the source, none of which is too young to be asked for."""
    last_at = now.replace(minute=0, second=0, microsecond=0) - 4 * HOUR
    return [last_at - number * HOUR for number in range(DAYS * 24)]


def backfill(job: str, now: datetime) -> tuple[str, ...]:
    """The command that asks for all hours of the source again."""
    start, end = min(hours_before(now)), max(hours_before(now)) + HOUR
    return ("backfill", job, "--from", f"{start:%Y-%m-%dT%H:%M:%SZ}", "--to", f"{end:%Y-%m-%dT%H:%M:%SZ}")


def delivered(folder: Path, hours: str, bad_lines: Sequence[bytes]) -> Counter[str]:
    """Lines of the objects below `hours`, and rows of the warehouse. Bad lines are told of by what was set aside."""
    with landed(folder, Clock(datetime.now(UTC))) as made:
        lines = ((key, line) for key, each in made.lines(hours).items() for line in each)
        found = Counter(f"{key} {line!r}" for key, line in lines if line not in bad_lines)
        for table, rows in made.tables().items():
            found.update(f"{table} {row}" for row in rows)
    return found


def set_aside(folder: Path, job: str) -> Counter[str]:
    """Lines that are set aside, each once: what a killed run had kept is kept again."""
    with landed(folder, Clock(datetime.now(UTC))) as made:
        objects = made.objects(f"{job}/_set_aside/")
    return Counter({f"{key} {line!r}" for key, body in objects.items() for line in body.splitlines()})

"""The zip of weeks: ISO names, one entry each, readable by others."""

import gzip
import io
import subprocess
import zipfile
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from app.amplitude.archives import monday, name_of, weeks
from needs import needs


@pytest.mark.parametrize(
    ("day", "name"),
    [
        (date(2024, 2, 1), "2024_week_5"),
        (date(2024, 12, 30), "2025_week_1"),
        (date(2027, 1, 1), "2026_week_53"),
        (date(2026, 12, 28), "2026_week_53"),
        (date(2021, 1, 3), "2020_week_53"),
    ],
)
def test_year_and_week_of_a_name_begin_together(day: date, name: str) -> None:
    assert name_of(day) == name
    assert name_of(monday(day)) == name


def made(first: date, days: int, hours: dict[datetime, bytes]) -> bytes:
    streams = ((at, io.BytesIO(gzip.compress(text))) for at, text in sorted(hours.items()))
    return b"".join(weeks(streams, [first + timedelta(days=number) for number in range(days)]))


def test_a_range_over_new_year_has_an_entry_for_each_week_also_for_an_empty_one(tmp_path: Path) -> None:
    hours = {
        datetime(2026, 12, 27, 23, tzinfo=UTC): b'{"n":1}\n{"n":2}',
        datetime(2027, 1, 3, 23, tzinfo=UTC): b'{"n":3}\n',
        datetime(2027, 1, 11, 0, tzinfo=UTC): b'{"n":4}\n',
    }
    body = made(date(2026, 12, 27), 16, hours)
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == {
            "2026_week_52.ndjson": b'{"n":1}\n{"n":2}\n',
            "2026_week_53.ndjson": b'{"n":3}\n',
            "2027_week_1.ndjson": b"",
            "2027_week_2.ndjson": b'{"n":4}\n',
        }
    path = tmp_path / "weeks.zip"
    path.write_bytes(body)
    told = subprocess.run([needs("unzip"), "-t", path], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout


def test_the_same_hours_give_the_same_bytes() -> None:
    hours = {datetime(2026, 2, 2, hour, tzinfo=UTC): b'{"n":%d}\n' % hour * 100 for hour in range(5)}
    assert made(date(2026, 2, 2), 7, hours) == made(date(2026, 2, 2), 7, hours)

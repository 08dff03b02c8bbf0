"""Objects that are replaced and deleted while reports run: each answer is of whole versions, or says to try again."""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from app.analytics.columns import ReportFile
from app.analytics.engine import Engine, UnreadableObject
from app.analytics.formats import AnswerShape
from app.analytics.queries import Queries, ReadSet, ReportObjects
from app.core.errors import Transient
from app.db.object_summaries import SqlSummaries
from app.db.state import State
from lake import Lake, bucket_lake, local_lake, parquet

OBJECTS = 12
VERSIONS = 8
QUERIES = 15
PAUSE_SECONDS = {"directory": 0.02, "bucket": 0.04, "bucket in pieces": 0.4}


def version(number: int, value: int) -> bytes:
    """An object whose every row says which object and which version it is; a version is known by its length too."""
    rows = 400 + 100 * value
    return parquet(
        {
            "device_id": [f"D{number}"] * rows,
            "timestamp": [datetime(2026, 2, 1, tzinfo=None)] * rows,  # noqa: DTZ001 - as document 004 has it
            "voltage": [float(value)] * rows,
            "temperature": [random.Random(row).random() for row in range(rows)],  # noqa: S311 - hard to compress
        }
    )


@contextmanager
def written(lake: Lake, pause_seconds: float) -> Iterator[None]:
    """One writer replaces objects all the time; the last object comes and goes."""
    done = threading.Event()
    contents = [[version(number, value) for value in range(VERSIONS)] for number in range(OBJECTS)]
    for number in range(OBJECTS):
        lake.put(f"{number}.parquet", contents[number][0])

    def write() -> None:
        draw = random.Random(1)  # noqa: S311 - test data
        while not done.wait(pause_seconds):
            number = draw.randrange(OBJECTS)
            if number == OBJECTS - 1 and draw.random() < 0.5:
                lake.store.delete(f"telemetry/{number}.parquet")
            else:
                lake.put(f"{number}.parquet", draw.choice(contents[number]))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        done.set()
        writer.join()


@pytest.mark.slow
@pytest.mark.parametrize("kind", PAUSE_SECONDS)
def test_no_answer_is_of_half_a_version(
    kind: str, request: pytest.FixtureRequest, new_state: Callable[[str], State], tmp_path: Path
) -> None:
    facts = new_state("sqlite").summaries
    made = local_lake(tmp_path / "lake", facts) if kind == "directory" else bucket(kind, request, facts, tmp_path)
    with closing(made) as lake, written(lake, PAUSE_SECONDS[kind]):
        answered = 0
        for _ in range(QUERIES):
            try:
                lake.summaries.refresh()
                assert_whole(lake.from_summaries("daily-summary"))
                assert_whole(lake.from_objects("daily-summary"))
            except Transient:
                continue
            answered += 1
        assert answered > QUERIES / 2


def bucket(kind: str, request: pytest.FixtureRequest, facts: SqlSummaries, tmp_path: Path) -> Lake:
    whole_bytes = 100 if kind == "bucket in pieces" else 1 << 24
    return bucket_lake(request.getfixturevalue("seaweed"), tmp_path / "lake", facts, whole_bytes=whole_bytes)


def assert_whole(rows: Sequence[tuple[Any, ...]]) -> None:
    assert OBJECTS - 1 <= len(rows) <= OBJECTS
    for device, _, voltage, _, _, count in rows:
        assert (voltage, count) == (round(voltage), 400 + 100 * round(voltage)), device


class ReplacedWhileRead:
    """Objects of which one is replaced each time while it is read in pieces."""

    def __init__(self, lake: Lake, objects: ReportObjects) -> None:
        self._lake, self._objects, self._number = lake, objects, 0

    @contextmanager
    def opened(self, wanted: ReadSet) -> Iterator[tuple[Engine, Sequence[ReportFile]]]:
        with self._objects.opened(wanted) as found:
            if any(source.key.endswith("/1.parquet") for source in wanted.sources):
                self._number += 1
                self._lake.put("1.parquet", version(1, self._number))
                raise UnreadableObject("1.parquet was replaced", "read it again")
            yield found

    def certain(self, wanted: ReadSet) -> bool:
        return self._objects.certain(wanted)

    def close(self) -> None:
        self._objects.close()


def test_an_object_that_is_replaced_whenever_it_is_read_is_not_left_out_as_damaged(
    new_state: Callable[[str], State], tmp_path: Path
) -> None:
    with closing(local_lake(tmp_path / "lake", new_state("sqlite").summaries)) as lake:
        for number in range(3):
            lake.put(f"{number}.parquet", version(number, 0))
        lake.summaries.refresh()
        replaced = ReplacedWhileRead(lake, lake.objects(lake.engine))
        report = lake.reports["daily-summary"]
        with closing(Queries(lake.summaries, replaced, lake.engine)) as queries, pytest.raises(Transient):
            queries.run(report, report.values([]), AnswerShape("json", "data"))
        assert len(lake.from_objects("daily-summary")) == 3
